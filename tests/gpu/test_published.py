"""Launches and memory of published configurations: real networks, on a card that computes nothing.

A change that adds to them is seen here. One that takes from them should lower the bounds.
"""

from typing import NamedTuple

import pytest

from cmtool.training.cost import GIB, check_bank
from tests.gpu.pretend.published import CONFIGURATIONS, measured
from tests.gpu.pretend.training import training

pytestmark = pytest.mark.pretend_gpu


class Bound(NamedTuple):
    """The most that a step may launch, and may hold at once beside cuDNN's workspaces.

    The paths of a teacher, whose number the preset says, are not in it.
    """

    launches: int
    peak_gib: float


BOUNDS = {
    "imagenet64-cd": Bound(4_600, 14.3),  # 4,459 and 13.87 measured
    "cifar10-cd": Bound(3_400, 7.3),  # 3,324 and 7.04
    "emoji-cmt": Bound(890, 0.15),  # 865 and 0.143, beside 0.025 of paths
}


def test_every_configuration_has_a_bound():
    assert BOUNDS.keys() == CONFIGURATIONS.keys()


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_a_step_stays_within_its_bound(name):
    made = training(*CONFIGURATIONS[name])
    counted, peak_gib = measured(made)
    paths = check_bank(made.preset, room=1 << 40, device="cuda", processes=1)
    assert counted.launches <= BOUNDS[name].launches
    assert peak_gib - paths / GIB <= BOUNDS[name].peak_gib
    assert len(counted.waits) == 1, str(counted)
