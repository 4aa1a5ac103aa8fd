"""The loss of held-out images: which images, at which noise, and against the loss by hand."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from cmtool.core.methods import METHODS, Models
from cmtool.core.rng import keyed_generator, seeded
from cmtool.data.datasets import Dataset, load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.data.held_out import Subset, split
from cmtool.data.images import from_uint8
from cmtool.errors import UserError
from cmtool.evaluation.held_out import CHUNK, held_out_loss, last_stage
from cmtool.models import load_model
from cmtool.presets.build import build_denoiser, build_network
from cmtool.presets.toml import load_preset, preset_names
from cmtool.system.dist import ALONE
from tests.cli.conftest import TINY, bare_runs, cmtool  # noqa: F401  # fixtures
from tests.cli.test_train import assert_equal


def numbered(n):
    """Images that say which they are."""
    values = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)
    return Dataset("n", values.expand(n, 3, 8, 8).contiguous(), torch.arange(n) % 10, 10)


def test_both_parts_are_all_images_in_their_order_and_the_same_always():
    data = numbered(100)
    train, held = split(data, 0.07)
    assert (len(train), len(held)) == (93, 7)
    places = [part.images[:, 0, 0, 0].tolist() for part in (train, held)]
    assert sorted(places[0] + places[1]) == list(range(100))
    assert all(place == sorted(place) for place in places)
    for part, place in zip((train, held), places, strict=True):
        assert part.labels.tolist() == [i % 10 for i in place]
        assert part.num_classes == 10
    again = split(data, 0.07)
    assert [part.fingerprint() for part in again] == [p.fingerprint() for p in (train, held)]
    assert train.fingerprint() != data.fingerprint()
    for share in (0.001, 0.999):
        with pytest.raises(UserError, match=r"data\.held_out = 0\.[09]"):
            split(numbered(20), share)


def test_streamed_images_are_parted_alike_and_stay_streamed():
    whole = numbered(50)

    class Lazy:
        shape = whole.images.shape

        def __len__(self):
            return 50

        def __getitem__(self, index):
            return whole.images[index]

    streamed = replace(whole, images=Lazy(), known_hash="abc")
    for ours, theirs in zip(split(streamed, 0.2), split(whole, 0.2), strict=True):
        assert isinstance(ours.images, Subset)
        assert ours.images.shape == theirs.images.shape
        assert torch.equal(ours.images[torch.arange(len(ours))], theirs.images)
        assert ours.fingerprint() not in ("abc", theirs.fingerprint())
    train, held = split(streamed, 0.2)
    assert train.fingerprint() != held.fingerprint()
    assert train.fingerprint() != split(streamed, 0.201)[0].fingerprint()


OPTIONS = {"model_channels": 16, "norm_groups": 4, "head_channels": 16, "dropout": 0.3}
SMALL = {**{f"model.network.{k}": v for k, v in OPTIONS.items()}, "train.batch": 8}
ELSEWHERE = {
    "uncertain_denoising": ("imagenet64-edm2-s", "digits-edm"),
    "continuous_distillation": ("cifar10-cd-continuous-l2-stopgrad", "digits-cd"),
    "live_distillation": ("cifar10-cd-continuous-l2", "digits-cd"),
}
"""Where the methods are that no preset of the digits has, and one of the same kind."""


@cache
def of_method(name):
    """A small preset of the digits with a method."""
    if name in ELSEWHERE:
        theirs, ours = ELSEWHERE[name]
        preset = load_preset(theirs)
        return load_preset(ours, SMALL).model_copy(update={"loss": preset.loss})
    names = [n for n in preset_names() if n.startswith("digits-")]
    return next(p for n in names if (p := load_preset(n, SMALL)).loss.method.name == name)


def network_of(preset, seed):
    """A denoiser of a preset, no weight of which is 0."""
    with seeded(keyed_generator("network", seed)):
        made = build_denoiser(preset, build_network(preset.model))
        for p in made.parameters():
            p.data += 0.05 * torch.randn(p.shape)
    return made.train()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_loss_that_depends_on_the_model_alone(name):
    preset, row = of_method(name), METHODS[name]
    assert preset.loss.method.name == name
    f, guide = network_of(preset, 0), network_of(load_preset("digits-edm", SMALL), 1).eval()
    own = row.owns() if row.owns else None
    if row.before is not None:
        own.sigmas[:4] = torch.tensor([0.002, 0.1, 2.0, 80.0])
        own.facts[:] = torch.tensor([4, 0])
    held = load_dataset("digits:held-out")
    target = network_of(preset, 2) if preset.loss.target in ("ema", "previous") else f
    loss = held_out_loss(preset, held, guide, 5, "cpu")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = loss(Models(f, target, own=own), 1, ALONE, None)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert loss(Models(f, target, own=own), 2, ALONE, None) == first
    assert f.training
    assert all(p.grad is None for p in f.parameters())
    other = network_of(preset, 3)
    assert loss(Models(other, other, own=own), 3, ALONE, None) != first


def test_a_teachers_loss_is_edms_by_hand():
    preset = load_preset("digits-edm")
    model, held = load_model("digits-edm"), load_dataset("digits:held-out")
    images = held.images[torch.randperm(len(held), generator=keyed_generator("subset"))[:40]]
    chosen = held.labels[torch.randperm(len(held), generator=keyed_generator("subset"))[:40]]
    losses = []
    for number, first in enumerate(range(0, 40, CHUNK)):
        x0, labels = from_uint8(images[first : first + CHUNK]), chosen[first : first + CHUNK]
        generator = keyed_generator("held out", number)
        options = preset.loss.levels.options
        mean, std = options.get("mean", -1.2), options.get("std", 1.2)
        z = torch.randn(len(x0), dtype=torch.float64, generator=generator)
        sigma = (mean + std * z).exp()
        noise = torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            d = model.f(x0 + sigma.float()[:, None, None, None] * noise, sigma, labels)
        weight = sigma**-2 + preset.model.sigma_data**-2
        losses += (weight * (d - x0).double().square().mean((1, 2, 3))).tolist()
    found = held_out_loss(preset, held, None, 40, "cpu")(Models(model.f, model.f), 0, ALONE, None)
    assert found == pytest.approx(sum(losses) / 40, rel=1e-5)


def test_several_processes_find_the_value_of_one():
    preset, held = load_preset("digits-edm"), load_dataset("digits:held-out")
    f = load_model("digits-edm").f
    alone = held_out_loss(preset, held, None, 90, "cpu")(Models(f, f), 0, ALONE, None)

    class Other:
        """A process of two, which learns what the other found before."""

        world_size, calls = 2, 0

        def __init__(self, rank, theirs):
            self.rank, self.theirs = rank, theirs

        def together(self, action, name):
            return action()

        def gather(self, what):
            self.given = what
            return [what, self.theirs] if self.rank == 0 else [self.theirs, what]

    calls = []

    def counting(x, sigma, *rest):
        calls.append(len(x))
        return type(f).forward(f, x, sigma, *rest)

    first, values = Other(0, {}), held_out_loss(preset, held, None, 90, "cpu")
    f.forward = counting
    try:
        values(Models(f, f), 0, first, None)
        ours = len(calls)
        second = Other(1, first.given)
        assert values(Models(f, f), 0, second, None) == alone
        assert len(calls) == 2 * ours == 4  # both as often, though there are three parts
    finally:
        del f.forward


def test_the_stage_is_the_last():
    preset = load_preset("digits-ict")
    stage = last_stage(preset)
    assert stage.images == (preset.train.steps - 1) * preset.train.batch
    assert stage.n == max(last_stage(preset).n, 10)


LOSS = ["--set", "run.eval_metric=loss", "--eval-every", "1", "--set", "run.eval_num=8", "--set",
        "run.sample_grid=4"]  # fmt: skip


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("bare_runs")
def test_a_run_measures_its_loss_on_images_that_it_does_not_train_on(cmtool, tmp_path):  # noqa: F811
    run = ["train", "--preset", "digits-edm", *TINY, "--set", "data.held_out=0.05", "--set",
           "train.steps=3", "--set", "run.sample_every=100",
           "--set", "run.sample_grid=4", "--set", "sample.steps=1"]  # fmt: skip
    made = cmtool(*run, *LOSS, "--out", "r")
    assert made.code == 0, made.err
    assert "577 images are held out, 10,959 are trained on" in made.err
    found = [line["eval"] for line in log(tmp_path / "r")]
    assert [(v["metric"], v["num"], v["step"]) for v in found] == [
        ("loss", 8, s) for s in (1, 2, 3)
    ]
    best = json.loads((tmp_path / "r/checkpoints/best.json").read_text())
    values = {f"step-{v['step']:07}": v["value"] for v in found}
    assert best["checkpoint"] == min(values, key=values.get)
    model, preset = load_model(str(tmp_path / "r")), load_preset(str(tmp_path / "r/preset.toml"))
    _, held = split(load_dataset("digits"), 0.05)
    loss = held_out_loss(preset, held, None, 8, "cpu")
    assert found[-1]["value"] == loss(Models(model.f, model.f), 3, ALONE, None)
    record = json.loads((tmp_path / "r/run.json").read_text())["data"]
    assert (record["images"], len(record["held_out"])) == (10_959, 16)
    assert cmtool(*run, "--out", "plain").code == 0
    final = "checkpoints/step-0000003"
    assert_equal(tmp_path / "plain" / final, tmp_path / "r" / final)  # measuring changes nothing
    again = cmtool("train", "--resume", "--out", "r", "--device", "cpu")
    assert again.code == 0, again.err
    other = cmtool("train", "--resume", "--out", "r", "--set", "data.held_out=0.1")
    assert (other.code, "was started with another" in other.err) == (2, True)


@pytest.mark.usefixtures("bare_runs")
def test_a_resumed_run_finds_the_same_values(cmtool, tmp_path):  # noqa: F811
    run = ["train", "--preset", "digits-ct", *TINY, "--set", "data.held_out=digits:held-out",
           "--set", "run.sample_every=100", "--set", "run.checkpoint_every=2", *LOSS]  # fmt: skip
    assert cmtool(*run, "--set", "train.steps=4", "--out", "whole").code == 0
    assert cmtool(*run, "--set", "train.steps=4", "--out", "parts", "--max-time", "0").code == 75
    assert cmtool("train", "--resume", "--out", "parts", "--device", "cpu").code == 0
    whole, parts = (
        [x["eval"] for x in log(tmp_path / r) if "eval" in x] for r in ("whole", "parts")
    )
    assert whole[-3:] == parts[-3:]
    assert whole[0]["value"] != whole[-1]["value"]
    record = json.loads((tmp_path / "whole/run.json").read_text())["data"]
    assert record["images"] == 11_536


def test_a_loss_without_images_is_refused_before_anything_is_read(cmtool):  # noqa: F811
    dry = ["train", "--preset", "digits-ct", "--dry-run", *LOSS]
    refused = cmtool(*dry)
    assert (refused.code, "hint: --set data.held_out=0.05" in refused.err) == (2, True)
    assert cmtool(*dry, "--set", "data.held_out=0.05").code == 0
    assert cmtool(*dry, "--set", "data.held_out=1.5").code == 2
    assert cmtool(*dry, "--set", "data.held_out=0.05", "--set", "run.eval_metric.x=1").code == 2


@pytest.mark.usefixtures("bare_runs")
def test_held_out_images_of_other_classes_are_refused(cmtool, tmp_path):  # noqa: F811
    for folder, names in (("a", "xy"), ("b", "yz"), ("c", "x")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(4):
                picture = png_bytes(torch.full((3, 8, 8), 9 * i, dtype=torch.uint8))
                (tmp_path / folder / name / f"{i}.png").write_bytes(picture)
    run = ["train", "--preset", "digits-ct", *TINY, "--data", "a", "--set", "train.steps=1",
           "--set", "model.num_classes=2", *LOSS]  # fmt: skip
    for other, what in (("b", "the classes of b are not"), ("c", "the classes of c are not"),
                        ("gone", "no data set or folder 'gone'")):  # fmt: skip
        result = cmtool(*run, "--set", f"data.held_out={other}", "--out", "r")
        assert (result.code, what in result.err) == (3, True), result.err
    assert cmtool(*run, "--set", "data.held_out=a", "--out", "r").code == 0
