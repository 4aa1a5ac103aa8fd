import os
import shutil
import subprocess

import pytest

from tests.hub import hub  # noqa: F401
from tests.site import site  # noqa: F401

TWO_NODES = "test_two_nodes.py"


def can_make_namespaces():
    """Whether this user may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"cmtool-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return made


POSSIBLE = can_make_namespaces()


def pytest_ignore_collect(collection_path):
    return True if collection_path.name == TWO_NODES and not POSSIBLE else None


def pytest_report_header():
    return None if POSSIBLE else f"{TWO_NODES} is left out: it needs root and `ip netns`"


@pytest.fixture(scope="module")
def model():
    """The bundled one-step model."""
    from cmtool.models import load_model

    return load_model("digits-cd")


@pytest.fixture(scope="module")
def images():
    """Three digits that it has not seen, in [-1, 1]."""
    from cmtool.data.datasets import digits
    from cmtool.data.images import from_uint8

    return from_uint8(digits("held-out").images[:3])
