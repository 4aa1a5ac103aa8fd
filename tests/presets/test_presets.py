import pytest
import torch

from cmtool.core.methods import METHODS
from cmtool.core.noise import karras_sigmas
from cmtool.errors import MissingError, UserError
from cmtool.presets.build import (
    build_curriculum,
    build_denoiser,
    build_network,
    build_objective,
    build_sampler,
    needs_teacher,
)
from cmtool.presets.toml import (
    is_method_preset,
    load_preset,
    parse_override,
    preset_names,
    resolve,
    to_toml,
)
from cmtool.sampling import plan
from cmtool.training.state import fit_settings


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    preset = load_preset(name)
    assert preset.description
    if preset.loss.distance.name == "lpips":  # its weights are not there, and it says so
        with pytest.raises(MissingError, match="vgg16"):
            build_objective(preset, lambda *_: None)
        preset = load_preset(name, {"loss.distance": "l2"})
    with torch.device("meta"):  # full-size ones need no memory
        network = build_network(preset.model)
    build_objective(preset, build_denoiser(preset, network))
    assert METHODS[preset.loss.method.name].makes == preset.kind
    stage = build_curriculum(preset)(0, preset.train.steps)
    assert stage.n >= 2
    assert fit_settings(preset).steps == preset.train.steps
    build_sampler(preset.sample.sampler)
    for steps in (None, 1, 2, 5):
        assert plan(preset, steps=steps).sigmas[0] == preset.noise.sigma_max


EDM2_S = ["edm2-s", "ect-s", "ecd", "sct", "scd", "cmt"]
COUNTS = {
    "cifar10-edm-vp": 55_733_891, "cifar10-edm-cond-vp": 55_735_299,
    "cifar10-edm-ve": 56_397_827, "cifar10-edm-cond-ve": 56_400_643,
    "ffhq64-edm-vp": 61_805_571, "ffhq64-edm-ve": 62_761_091,
    "afhq64-edm-vp": 61_805_571, "afhq64-edm-ve": 62_761_091,
    **dict.fromkeys(  # EDM's, without the embedding of warps
        [f"cifar10-{m}" for m in ("ect", "ect-1h", "ecd", "sct", "scd", "cmt", "cmt-ect", "adcm")],
        55_733_891 - 9 * 128,
    ),
    "cifar10-tcm": 2 * (55_733_891 - 9 * 128),
    "cifar10-meanflow": 55_733_891 - 9 * 128 + 128 * 512,  # it hears two times
    "ffhq64-cmt": 61_805_571 - 9 * 128, "afhq64-cmt": 61_805_571 - 9 * 128,
    **dict.fromkeys([f"imagenet64-{n}" for n in EDM2_S], 280_209_381 - 128),  # head of a loss
    "imagenet64-edm2-xl": 1_119_276_837 - 128, "imagenet64-ect-xl": 1_119_276_837 - 128,
    "imagenet64-tcm": 2 * (280_209_381 - 128),
    "cifar10": 56_395_523, "imagenet64": 295_899_267, "bedroom256": 526_304_771,
    "cat256": 526_304_771,
}  # fmt: skip
"""Parameters of the published networks; a data set alone stands for its other presets."""


BUNDLED = ("digits", "emoji")
PUBLISHED = [n for n in preset_names() if not (n.startswith(BUNDLED) or is_method_preset(n))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_name_the_published_networks(name):
    with torch.device("meta"):
        network = build_network(load_preset(name).model)
    count = COUNTS.get(name) or COUNTS[name.partition("-")[0]]
    assert sum(p.numel() for p in network.parameters()) == count


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
    plain = preset.model.scalings.name == "edm" and preset.kind == "consistency"  # as ECT's code
    plain = plain or preset.model.network.name == "edm2"
    assert preset.data.augment == (AUGMENT[name.partition("-")[0]] if own else 0)
    assert preset.model.network.options.get("augment_dim", 0) == (9 if own else 0)
    assert preset.data.flip == (not own and not plain and name in PUBLISHED)


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
    if preset.loss.levels.name not in ("uniform", "lognormal_mass", "ramp"):
        return  # it has no grid
    steps = preset.train.steps
    points = preset.sample.grid or build_curriculum(preset)(steps, steps).n
    grid = karras_sigmas(points).tolist()
    for sigmas in preset.sample.levels.values():
        for sigma in sigmas:
            assert min(abs(level / sigma - 1) for level in grid) < 2e-3


CD, CT = {"name": "fixed"}, {"name": "consistency_training", "s0": 2}
CIFAR10 = {"batch": 512, "ema": 0.9999, "steps": 800_000, "precision": "fp32", "lr": 4e-4}
IMAGENET64 = {"batch": 2048, "ema": 0.999943, "precision": "bf16", "lr": 8e-6}
LSUN256 = {"batch": 2048, "ema": 0.999943, "precision": "bf16", "lr": 1e-5}
# Song et al. (2023), Table 3, its metrics, App. C for what it says of all runs and of single ones
TABLE_3 = {
    "cifar10-cd-l1": CIFAR10 | {"curriculum": CD | {"n": 18, "mu": 0.0}, "lr": 2e-4},
    "cifar10-cd-l2": CIFAR10 | {"curriculum": CD | {"n": 18, "mu": 0.0}},
    "cifar10-cd-lpips": CIFAR10 | {"curriculum": CD | {"n": 18, "mu": 0.0}},
    "cifar10-ct": CIFAR10 | {"curriculum": CT | {"s1": 150, "mu0": 0.9}},
    "imagenet64-cd-l2": IMAGENET64 | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000},
    "imagenet64-cd-lpips": IMAGENET64
    | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000},
    "imagenet64-ct": IMAGENET64 | {"curriculum": CT | {"s1": 200, "mu0": 0.95}, "steps": 800_000},
    "bedroom256-cd-l2": LSUN256
    | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000, "ema": None},
    "bedroom256-cd-lpips": LSUN256
    | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000, "ema": None},
    "bedroom256-ct": LSUN256 | {"curriculum": CT | {"s1": 150, "mu0": 0.95}, "steps": 1_000_000},
    "cat256-cd-l2": LSUN256 | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000},
    "cat256-cd-lpips": LSUN256 | {"curriculum": CD | {"n": 40, "mu": 0.95}, "steps": 600_000},
    "cat256-ct": LSUN256 | {"curriculum": CT | {"s1": 150, "mu0": 0.95}, "steps": 1_000_000},
}


@pytest.mark.parametrize("name", TABLE_3)
def test_consistency_presets_are_the_papers_table_3(name):
    preset, row = load_preset(name), TABLE_3[name]
    loss, train = preset.loss, preset.train
    assert {"name": loss.curriculum.name, **loss.curriculum.options} == row["curriculum"]
    assert [e.rate for e in train.ema] == (
        [] if row["ema"] is None else [pytest.approx(row["ema"], abs=5e-7)]
    )
    for key in ("steps", "batch", "lr", "precision"):
        assert getattr(train, key) == row[key], key
    assert preset.model.network.options["dropout"] == 0.0
    assert preset.data.flip
    assert (train.optimizer.name, train.optimizer.options) == ("radam", {})
    assert (train.warmup_steps, train.decay_to, train.max_grad_norm) == (0, 1.0, None)
    assert (loss.weight.name, loss.levels.name) == ("uniform", "uniform")
    method = name.split("-")[1]
    kinds = {"cd": "consistency_distillation", "ct": "consistency_training"}
    assert loss.method.name == kinds[method]
    assert preset.model.scalings.name == "consistency"
    assert loss.solver.name == "heun"
    assert loss.target == ("student" if row["curriculum"].get("mu") == 0 else "ema")
    distance = name.split("-")[2] if method == "cd" else "lpips"
    assert loss.distance.name == distance
    if distance == "lpips":  # pooling and resizing of the release that trained it
        jax = {"pooling": "max", "resize": "always"} if name.startswith("cifar10") else {}
        assert loss.distance.options == jax
    assert (preset.noise.sigma_min, preset.noise.sigma_max, preset.noise.rho) == (0.002, 80.0, 7.0)
    assert preset.model.sigma_data == 0.5


TEACHERS = {  # batch, steps, lr, optimizer, dropout, FID (Table 1 and 2), evaluations
    "cifar10-edm": (512, 400_000, 1e-3, "adam", 0.13, "2.04", 35),
    "imagenet64-edm": (4096, 610_352, 1e-4, "radam", 0.1, "2.44", 79),
    "bedroom256-edm": (2048, 600_000, 1e-4, "radam", 0.1, "3.57", 79),
    "cat256-edm": (2048, 300_000, 1e-4, "radam", 0.1, "6.69", 79),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_presets_are_the_ones_the_paper_distills(name):
    preset = load_preset(name)
    batch, steps, lr, optimizer, dropout, fid, evaluations = TEACHERS[name]
    assert (preset.train.batch, preset.train.steps, preset.train.lr) == (batch, steps, lr)
    assert preset.train.optimizer.name == optimizer
    assert preset.model.network.options["dropout"] == dropout
    assert (preset.loss.weight.name, preset.loss.levels.name) == ("karras", "lognormal")
    assert preset.data.flip
    assert f"FID {fid} in {evaluations} evaluations" in preset.description
    assert plan(preset).evaluations == evaluations


REPORTED = {  # FID of one step and of two (Tables 1 and 2), and the number of GPUs (Table 3)
    "cifar10-cd-lpips": ("3.55", "2.93", "8"), "cifar10-ct": ("8.70", "5.83", "8"),
    "imagenet64-cd-lpips": ("6.20", "4.70", "64"), "imagenet64-ct": ("13.0", "11.1", "64"),
    "bedroom256-cd-lpips": ("7.80", "5.22", "64"), "bedroom256-ct": ("16.0", "7.85", "64"),
    "cat256-cd-lpips": ("11.0", "8.84", "64"), "cat256-ct": ("20.7", "11.7", "64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_presets_name_the_fid_the_paper_reports_and_what_it_took(name):
    preset, (one, two, gpus) = load_preset(name), REPORTED[name]
    steps = f"{preset.train.steps // 1000:,}k"
    assert preset.description.endswith(
        f"FID {one} in one step, {two} in two; {steps} steps on {gpus} A100"
    )


def test_progressive_distillation_is_the_published_configuration():
    preset = load_preset("cifar10-pd")
    assert "FID 8.34 in one step, 5.58 in two" in preset.description
    train, loss = preset.train, preset.loss
    assert (train.optimizer.name, train.lr, train.decay_to) == ("adam", 5e-5, 0.0)
    assert (train.max_grad_norm, train.batch, train.ema) == (1.0, 512, ())
    assert (loss.distance.name, loss.weight.name) == ("l2", "truncated_snr")
    curriculum = build_curriculum(preset)
    assert [curriculum(k, train.steps).n - 1 for k in (0, train.steps - 1)] == [4096, 1]
    assert preset.model.network.options["dropout"] == 0.0


CONTINUOUS = {  # method, distance, lr, dropout (App. B.3); "live" is without stop-gradient
    "cifar10-cd-continuous-l1": ("live_distillation", "l1", 1e-3, 0.3),
    "cifar10-cd-continuous-l2": ("live_distillation", "l2", 1e-3, 0.13),
    "cifar10-cd-continuous-l2-stopgrad": ("continuous_distillation", "l2", 5e-6, 0.0),
    "cifar10-cd-continuous-lpips-stopgrad": ("continuous_distillation", "lpips", 5e-6, 0.0),
    "cifar10-ct-continuous-l2": ("continuous_training", "l2", 5e-6, 0.0),
    "cifar10-ct-continuous-lpips": ("continuous_training", "lpips", 5e-6, 0.0),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_presets_are_those_of_appendix_b3(name):
    preset = load_preset(name)
    loss, train = preset.loss, preset.train
    dropout = preset.model.network.options["dropout"]
    assert (loss.method.name, loss.distance.name, train.lr, dropout) == CONTINUOUS[name]
    assert loss.target == "student"
    assert (loss.levels.name, loss.weight.name) == ("ramp", "uniform")
    assert (train.batch, train.steps) == (512, 800_000)
    assert [e.rate for e in train.ema] == [0.9999]
    assert needs_teacher(preset)  # CT too starts from a teacher's weights
    assert train.from_teacher == (loss.method.name == "continuous_training")


def test_fixed_consistency_training_is_that_of_appendix_b3():
    preset = load_preset("cifar10-ct-fixed")
    assert preset.loss.curriculum.options == {"n": 120, "mu": 0.99}
    assert (preset.train.lr, preset.train.from_teacher) == (4e-4, True)
    assert (preset.loss.method.name, preset.loss.target, preset.loss.distance.name) == (
        "consistency_training", "ema", "lpips",
    )  # fmt: skip


def test_an_empty_table_empties_the_one_it_extends_and_an_empty_section_does_not(tmp_path):
    (tmp_path / "own.toml").write_text('extends = "digits-cd"\n[sample]\nlevels = {}\n[train]\n')
    found = resolve(str(tmp_path / "own.toml"), {})
    assert load_preset("digits-cd").sample.levels
    assert found.preset.sample.levels == {}
    assert found.origins["sample.levels"] == "own.toml"
    assert found.preset.train == load_preset("digits-cd").train


@pytest.mark.parametrize(
    ("key", "meant"),
    [("lr", "train.lr"), ("steps", "sample.steps or train.steps"),
     ("model_channels", "model.network.model_channels"), ("train.sigma_max", "noise.sigma_max"),
     ("loss.path", "data.path"), ("metric", None), ("train.stpes", None)],
)  # fmt: skip
def test_a_key_in_the_wrong_table_is_told_where_it_belongs(key, meant):
    with pytest.raises(UserError, match=f"unknown key '{key}'") as caught:
        load_preset("digits-cd", {key: 1})
    wanted = f"did you mean {meant}?" if meant else "choose from "
    assert wanted in caught.value.hint
