import pytest

from tests.cli.conftest import bare_runs, cmtool  # noqa: F401
from tests.gpu.pretend import card


def pytest_runtest_setup(item):
    """Leave out the tests of the pretended card in a process that has none."""
    if item.get_closest_marker("pretend_gpu") and not card.is_there():
        pytest.skip("no pretended card: python -m tests.gpu.pretend pytest -m pretend_gpu")
