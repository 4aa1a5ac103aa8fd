import gc
import sys

import pytest
import torch  # noqa: F401  # it is imported, as far as the first test knows

from cmtool.cli._options import importing_torch


def test_the_collector_works_on_where_torch_is_imported_already():
    gc.unfreeze()
    with importing_torch():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_rests_while_torch_is_imported(monkeypatch, fails):
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with importing_torch():
            assert not gc.isenabled()
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
