import pytest
import torch

from cmtool.build import (
    build_curriculum,
    build_denoiser,
    build_objective,
    build_sampler,
    fit_settings,
)
from cmtool.components import build_network
from cmtool.core.noise import karras_sigmas
from cmtool.errors import MissingError, UserError
from cmtool.presets import load_preset, parse_override, preset_names, resolve
from cmtool.sampling import plan
from cmtool.toml import to_toml


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    preset = load_preset(name)
    assert preset.description
    if preset.loss.distance.name == "lpips":  # its weights are not there, and it says so
        with pytest.raises(MissingError, match="vgg16"):
            build_objective(preset, None if not preset.distills else lambda *_: None)
        preset = load_preset(name, {"loss.distance": "l2"})
    with torch.device("meta"):  # full-size ones need no memory
        network = build_network(preset.model)
    build_denoiser(preset, preset.kind, network)
    teacher = build_denoiser(preset, "teacher", network) if preset.loss.pair == "teacher" else None
    build_objective(preset, teacher)
    stage = build_curriculum(preset)(0, preset.train.steps)
    assert stage.n >= 2
    assert fit_settings(preset).steps == preset.train.steps
    build_sampler(preset.sample.sampler)
    for steps in (None, 1, 2, 5):
        assert plan(preset, steps=steps).sigmas[0] == preset.noise.sigma_max


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_being_written_out(name, tmp_path):
    resolved = resolve(name, {})
    path = tmp_path / "again.toml"
    path.write_text(to_toml(resolved.preset, resolved.origins))
    assert load_preset(str(path)) == resolved.preset


def test_overrides_go_over_the_file_in_order():
    resolved = resolve("digits-cd", {"--set": {"train.lr": 0.1}, "--seed": {"train.seed": 4}})
    assert resolved.preset.train.lr == 0.1
    assert resolved.origins["train.lr"] == "--set"
    assert resolved.origins["train.seed"] == "--seed"
    assert resolved.origins["model.channels"] == "digits-edm.toml"
    assert resolved.origins["noise.rho"] == "default"


def test_a_component_of_another_name_brings_its_own_options_only():
    preset = load_preset("digits-cd", {"loss.curriculum": "consistency_training"})
    assert preset.loss.curriculum.options == {}
    preset = load_preset("digits-cd", {"loss.curriculum.n": 9})
    assert preset.loss.curriculum.options["n"] == 9
    assert preset.loss.curriculum.name == "fixed"


def test_an_option_can_be_set_on_a_bare_name():
    preset = load_preset("digits-edm", {"loss.levels.mean": -2.0})
    assert preset.loss.levels.name == "lognormal"
    assert preset.loss.levels.options == {"mean": -2.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1e-4", ("a.b", 1e-4)),
        ("a.b=lpips", ("a.b", "lpips")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=true", ("a", True)),
        ('a={ name = "x", c = 1 }', ("a", {"name": "x", "c": 1})),
        ("a=x=y", ("a", "x=y")),
    ],
)
def test_overrides_are_read_as_toml_else_as_text(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize(("text", "count"), [("2k", 2000), ("1.5M", 1_500_000), (1e5, 100_000)])
def test_counts_may_be_written_short(text, count):
    assert load_preset("digits-cd", {"train.steps": text}).train.steps == count


@pytest.mark.parametrize("bad", [True, 1.5, "10x", -3])
def test_counts_that_are_not_whole_are_refused(bad):
    with pytest.raises(UserError):
        load_preset("digits-cd", {"train.steps": bad})


def test_presets_are_frozen():
    preset = load_preset("digits-cd")
    with pytest.raises(ValueError, match="frozen"):
        preset.train.lr = 1.0


def test_a_consistency_model_is_sampled_at_levels_it_was_trained_on():
    preset = load_preset("digits-cd")
    grid = karras_sigmas(preset.loss.curriculum.options["n"]).tolist()
    for steps in (1, 3, 5, 12):
        sigmas = plan(preset, steps=steps).sigmas
        assert len(set(sigmas)) == steps
        assert set(sigmas) <= set(grid[1:])
    assert len(set(plan(preset, steps=40).sigmas)) == 40
    assert plan(preset, steps=2).sigmas[1] == pytest.approx(
        min(grid, key=lambda s: abs(s - 1.143)), rel=1e-3
    )


AUGMENT = {"cifar10": 0.12, "ffhq64": 0.15, "afhq64": 0.15}
"""EDM's own recipes (train.py and README.md of NVlabs/edm)."""


@pytest.mark.parametrize("name", preset_names())
def test_edms_own_teachers_see_warped_images_all_others_mirrored_ones_or_none(name):
    preset = load_preset(name)
    own = "-edm-" in name
    assert preset.data.augment == (AUGMENT[name.partition("-")[0]] if own else 0)
    assert preset.model.network.options.get("augment_dim", 0) == (9 if own else 0)
    assert preset.data.flip == (not own and not name.startswith("digits"))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("digits-edm", {}, r"data.augment = 0.12 with model.network.augment_dim = 0"),
        ("digits-edm", {"model.network.augment_dim": 8}, "augment_dim = 8"),
        ("digits-edm", {"model.network.augment_dim": 9, "data.flip": True}, "with data.flip"),
        ("digits-ct", {"model.network.augment_dim": 9}, "not an EDM teacher"),
        ("digits-pd", {"model.network.augment_dim": 9}, "not an EDM teacher"),
    ],
)
def test_warps_without_a_network_that_is_told_of_them_are_refused(name, overrides, message):
    preset = load_preset(name, {"data.augment": 0.12, **overrides})
    with pytest.raises(UserError, match=message):
        build_objective(preset, None)


CONSISTENCY = [name for name in preset_names() if load_preset(name).kind == "consistency"]


@pytest.mark.parametrize("name", CONSISTENCY)
def test_tuned_levels_lie_on_the_final_training_grid(name):
    preset = load_preset(name)
    steps = preset.train.steps
    grid = karras_sigmas(build_curriculum(preset)(steps, steps).n).tolist()
    for sigmas in preset.sample.levels.values():
        for sigma in sigmas:
            assert min(abs(level / sigma - 1) for level in grid) < 2e-3
