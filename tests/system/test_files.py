import os

import pytest

from cmtool.errors import InputError
from cmtool.system.files import write_atomic


def test_a_special_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            write_atomic(target, b"")
