"""Runs that torch.compile may speed up, and those that it would make wrong."""

import pytest

from cmtool.errors import UserError
from cmtool.presets.toml import load_preset
from cmtool.system.dist import Group
from cmtool.training.state import build_state, check_compile

SHARING = ["digits-cd", "digits-ct", "digits-ict", "digits-ect", "digits-ct-continuous",
           "digits-sct", "digits-scd", "digits-meanflow", "digits-adcm", "digits-tcm"]  # fmt: skip


@pytest.mark.parametrize("name", SHARING)
def test_what_shares_dropout_masks_is_not_compiled(name):
    """torch.compile would draw other masks for the target than for the student."""
    preset = load_preset(name, {"train.compile": True, "model.network.dropout": 0.1})
    with pytest.raises(UserError, match=r"train.compile with dropout") as caught:
        check_compile(preset, Group())
    said = caught.value.hint.split(", or")[0].removeprefix("--set ").split("=")
    check_compile(load_preset(name, {"train.compile": True, said[0]: float(said[1])}), Group())


@pytest.mark.parametrize("name", ["digits-edm", "digits-pd", "digits-cmt"])
def test_what_shares_no_dropout_masks_is_compiled(name):
    preset = load_preset(name, {"train.compile": True, "model.network.dropout": 0.1})
    check_compile(preset, Group())


def test_a_deterministic_run_is_not_compiled():
    preset = load_preset("digits-edm", {"train.compile": True, "train.deterministic": True})
    with pytest.raises(UserError, match=r"train.compile with train.deterministic"):
        build_state(preset, None, "cpu")
