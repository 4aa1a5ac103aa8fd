"""The Python API, called as in a notebook."""

import subprocess
import sys

import pytest
import torch

import cmtool as api
from cmtool import edit, sample
from cmtool.cli import main
from cmtool.core.rng import SeededNoise
from cmtool.data.decoding import read_image
from cmtool.data.drawing import png_bytes
from cmtool.data.images import to_uint8
from cmtool.errors import InputError, UserError


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "-c", "digits-cd", "--device", "cpu"])
        assert not end.value.code

    return run


def test_importing_cmtool_imports_neither_torch_nor_pydantic():
    code = """import sys, cmtool
assert {"load_model", "sample", "edit", "evaluate"} <= set(dir(cmtool))
assert not {"torch", "pydantic", "typer", "numpy"} & sys.modules.keys()
from cmtool import edit, load_model
assert "torch" in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'smaple'"):
        _ = api.smaple


def test_a_loaded_model_has_its_function_preset_and_kind(model):
    assert (model.kind, model.preset.model.image_size) == ("consistency", (8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model.f(x, torch.full((2,), 80.0), torch.tensor([0, 1])).shape == x.shape


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"steps": 2, "labels": 3}, ["--steps", "2", "--class", "3"]),
        ({"sigmas": [80, 0.8], "labels": [4, 5, 6]}, ["--sigmas", "80,0.8", "--class", "4,5,6"]),
    ],
)
def test_sample_draws_what_the_command_draws(command, tmp_path, model, options, flags):
    drawn = sample(model, [5, 0, 7], **options)
    assert drawn.shape == (3, 3, 8, 8)
    assert drawn.dtype == torch.float32
    assert drawn.abs().max() <= 1
    command("sample", "--seeds", "5,0,7", *flags, "--out", "s")
    for image, seed in zip(to_uint8(drawn), (5, 0, 7), strict=True):
        assert torch.equal(image, read_image(tmp_path / f"s/seed00000{seed}.png"))


def test_an_image_belongs_to_its_seed(model):
    together = sample(model, range(9))
    assert torch.equal(sample(model, [7, 2]), together[[7, 2]])


@pytest.mark.parametrize(
    ("options", "what"),
    [({"labels": 10}, "no class 10"), ({"labels": [1, 2]}, "2 classes for 3 seeds"),
     ({"sigmas": [1, 80]}, "do not go from high"), ({"sigmas": [99]}, "above the model's 80"),
     ({"steps": 2, "sigmas": [80]}, "both --steps 2")],
)  # fmt: skip
def test_sample_names_what_the_model_does_not_know(model, options, what):
    with pytest.raises(UserError, match=what):
        sample(model, range(3), **options)


EDITS = {
    "inpaint": (
        ["--box", "4,0,4,8", "--steps", "3"],
        {"mask": torch.arange(8).expand(8, 8) >= 4, "steps": 3},
    ),
    "superres": (["--factor", "2", "--steps", "3"], {"factor": 2, "steps": 3}),
    "colorize": (["--steps", "3"], {"steps": 3}),
    "stroke": (["--sigmas", "9.7,2.5"], {"sigmas": [9.7, 2.5]}),
    "denoise": ([], {}),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_that_of_the_command(command, tmp_path, model, images, name):
    flags, arguments = EDITS[name]
    (tmp_path / "d.png").write_bytes(png_bytes(to_uint8(images[0])))
    command("edit", name, "d.png", *flags, "--seed", "3", "--out", "e.png")
    answer = getattr(edit, name)(model, images[0], **arguments, seed=3)
    assert torch.equal(to_uint8(answer), read_image(tmp_path / "e.png"))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("label", [None, 4])
def test_a_batch_is_its_images_with_seeds_that_count_up(model, images, name, label):
    function, arguments = getattr(edit, name), EDITS[name][1]
    together = function(model, images[:2], **arguments, seed=5, label=label)
    for i in range(2):
        alone = function(model, images[i], **arguments, seed=5 + i, label=label)
        assert torch.equal(alone, together[i])


def test_each_image_has_its_own_mask(model, images):
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, :4], mask[1, :, 4:] = True, True
    answer = edit.inpaint(model, images[:2], mask, steps=2)
    kept = ~mask.expand_as(answer)
    assert torch.equal(answer[kept], images[:2][kept])
    assert not torch.equal(answer, images[:2])


def test_a_grey_image_is_colourized_with_its_luma_kept(model, images):
    gray = images[0].mean(0, keepdim=True)
    answer = edit.colorize(model, gray, steps=2, label=1)
    assert answer.shape == (3, 8, 8)
    weights = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)
    torch.testing.assert_close(
        (weights * answer).sum(0), gray[0] * weights.sum(), atol=1e-3, rtol=0
    )


def test_denoise_takes_most_of_known_noise_out(model, images):
    noisy = images + 0.25 * SeededNoise(range(3))(images)
    clean = edit.denoise(model, noisy, 0.25)
    assert (clean - images).square().mean() < 0.5 * (noisy - images).square().mean()


def test_interpolation_goes_from_seed_to_seed_or_from_image_to_image(model, images):
    frames = edit.interpolate(model, 3, 7, frames=5, label=4)
    ends = sample(model, [3, 7], labels=4)
    torch.testing.assert_close(frames[[0, -1]], ends, atol=1e-4, rtol=0)
    frames = edit.interpolate(model, images[0], images[1], frames=3, label=4)
    assert torch.equal(frames[0], edit.stroke(model, images[0], label=4))
    with pytest.raises(UserError, match="from an image to a seed"):
        edit.interpolate(model, 3, images[0])


@pytest.mark.parametrize(
    ("image", "what"),
    [(torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8, not float"),
     (torch.zeros(8, 8), r"is \(8, 8\)"),
     (torch.zeros(1, 8, 8), "1 channels, not 3"), (torch.zeros(3, 9, 8), "8x9, the model makes")],
)  # fmt: skip
def test_an_image_that_does_not_fit_is_refused(model, image, what):
    with pytest.raises(InputError, match=what):
        edit.stroke(model, image)


def test_a_mask_that_is_not_bool_is_refused(model, images):
    with pytest.raises(InputError, match="not bool"):
        edit.inpaint(model, images[0], torch.ones(8, 8))


def test_evaluate_from_python(model):
    from cmtool import evaluate

    found = evaluate(sample(model, range(64)), metric="fid", reference="digits", device="cpu")
    assert found["metric"] == "fd-digits"
    assert 0 < found["value"] < 100
