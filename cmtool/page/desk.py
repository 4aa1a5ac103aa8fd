"""What the page asks for, answered by one model: edits, samples, morphs, and their commands.

A desk knows nothing of HTTP. An answer is what becomes JSON: pictures are PNG files in base64, and
`command` is what makes the same bytes in a shell.
"""

from __future__ import annotations

import base64
import os
import shlex
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from cmtool import prepared, sampling
from cmtool.core.edits import Edit, blur, gaussian_kernel
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.data.datasets import Dataset, load_dataset
from cmtool.data.decoding import read_image
from cmtool.data.drawing import animation_bytes, contact_sheet, png_bytes, row
from cmtool.data.images import brought, from_uint8, recoloured, to_uint8
from cmtool.editing import between_seeds
from cmtool.errors import InputError, UserError, nearest
from cmtool.formats.checkpoints import MANIFEST, newest, sized
from cmtool.models import PREFIX, Model, find_model
from cmtool.page.asked import AskedEdit, AskedHarm, AskedMorph, AskedSamples
from cmtool.page.rows import EDITS, NAME, Amount, Row
from cmtool.system.files import expanded

FITS = ("centre", "whole")
"""What of a picture of another shape is taken: its largest centre, or all of it on white."""
MOST_STEPS = 4
"""The page proposes noise levels for 1 to so many steps."""
SHOWN_ON_THE_WAY = 8
"""Answers on the way from noisy to clean that are shown."""
Answer = dict[str, Any]


class Interrupted(UserError):
    """Nobody waits for the answer any more, or the page is closing."""


@dataclass(frozen=True)
class Desk:
    """A model, what its user called it, and the options of a shell that name it again.

    Work ends at the next call of the network with Interrupted while `interrupt` is set, and for
    good when `closing` is.
    """

    model: Model
    name: str
    options: tuple[str, ...] = ()
    weights: str = "ema"
    interrupt: Event = field(default_factory=Event)
    closing: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.model.f.register_forward_pre_hook(lambda *_: self.go_on())
        self.first_seen  # noqa: B018  # now, and not at the first request

    def go_on(self) -> None:
        """Raise Interrupted if the work is to end."""
        if self.closing.is_set():
            raise Interrupted("the page is closing", "start it again")
        if self.interrupt.is_set():
            raise Interrupted("the work was interrupted", "press the button again")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's pictures."""
        return self.model.preset.model.image_size

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colours."""
        return self.model.preset.model.channels

    @cached_property
    def examples(self) -> Dataset:
        """Bundled pictures that no bundled model saw."""
        return load_dataset(f"{self.model.bundled_data}:held-out")

    @cached_property
    def first_seen(self) -> tuple[Path, int, int] | None:
        """The file of the model as it was when the page started; None if it is in no file."""
        return self._file()

    def _file(self) -> tuple[Path, int, int] | None:
        """Return the model's file with its time and size; None for a model of a hub."""
        if self.name.startswith(PREFIX):
            return None
        path = weight_file_of(self.name, self.weights)
        stat = path.stat()
        return path, stat.st_mtime_ns, stat.st_size

    def check_model(self) -> None:
        """Raise InputError where the model's file is gone or another: a shell would use that."""
        hint = "put it back, or start the page again"
        try:
            found = self._file()
        except (OSError, UserError):
            raise InputError(f"the model {self.name} is gone", hint) from None
        if found != self.first_seen:
            raise InputError(f"the model {self.name} is another now", hint)

    def about(self) -> Answer:
        """Return what the page has to know before it asks for anything."""
        noise, num = self.model.preset.noise, self.model.preset.model.num_classes
        names = self.model.class_names
        levels = [sampling.plan(self.model.preset, n).sigmas for n in range(1, MOST_STEPS + 1)]
        offered = {
            name: {
                "title": edit.title, "help": edit.help, "draws": edit.draws,
                "amount": edit.amount and _shown_amount(edit.amount(*self.size)),
                "hasSteps": edit.has_steps, "hasVariations": edit.has_variations,
            }
            for name, edit in EDITS.items() if self._can(name, edit)
        }  # fmt: skip
        return {
            "model": self.name, "height": self.size[0], "width": self.size[1],
            "channels": self.channels, "sigmaMin": noise.sigma_min, "sigmaMax": noise.sigma_max,
            "classes": [names[i] if i < len(names) else str(i) for i in range(num)],
            "levels": [[shown(sigma) for sigma in sigmas] for sigmas in levels],
            "edits": offered, "examples": len(self.examples),
        }  # fmt: skip

    def _can(self, name: str, edit: Row) -> bool:
        """Tell whether an edit suits the model: colours want three, blocks a size to divide."""
        if name == "superres" and edit.amount is not None:
            return bool(edit.amount(*self.size).choices)
        return name != "colorize" or self.channels == 3

    def picture(self, content: bytes, fit: str) -> Answer:
        """Return a picture file at the model's size, by one of FITS. Raises UserError."""
        if fit not in FITS:
            raise UserError(f"unknown fit {fit!r}", nearest(fit, FITS))
        image = read_image(content, NAME, "RGB" if self.channels == 3 else "L")
        return self._as_picture(brought(image, self.size, is_whole=fit == "whole"))

    def example(self, index: int) -> Answer:
        """Return a bundled picture at the model's size; after the last comes the first."""
        image = self.examples.images[torch.tensor([index % len(self.examples)])][0]
        return self._as_picture(brought(recoloured(image, self.channels), self.size))

    def harmed(self, asked: AskedHarm) -> Answer:
        """Return the picture with noise in it, or blurred."""
        x = from_uint8(self._pixels(asked.picture)[None])
        if asked.how == "noise":
            x = x + asked.amount * SeededNoise([asked.seed])(x)
        else:
            x = blur(x, gaussian_kernel(asked.amount))
        return self._as_picture(to_uint8(x)[0])

    def edit(self, asked: AskedEdit) -> Answer:
        """Return the answers of an edit, one for each number of steps. Raises UserError."""
        self.check_model()
        if asked.edit not in EDITS:
            raise UserError(f"no edit {asked.edit!r}", nearest(asked.edit, EDITS))
        edit = EDITS[asked.edit]
        picture, mask = self._pixels(asked.picture), self._mask(asked.mask, edit)
        amount, words = _amount(edit.amount and edit.amount(*self.size), asked.amount)
        x = from_uint8(picture[None])
        ready = edit.prepare(self.model, x, None if mask is None else mask[None] >= 128, amount)
        files = {"picture.png": encoded(png_bytes(picture))}
        if mask is not None:
            files["mask.png"] = encoded(png_bytes(mask))
            words = ["--mask", "mask.png", *words]
        said = ["edit", asked.edit, "picture.png", *words, "--seed", str(asked.seed)]
        if asked.label is not None:
            sampling.check_classes([asked.label], 1, self.model.preset.model.num_classes)
            said += ["--class", str(asked.label)]
        count = asked.variations if edit.has_variations else 1
        if count > 1:
            said += ["--variations", str(count)]
        steps = asked.steps if edit.has_steps else [None]
        answers = [self._answer(asked, ready, n, count, said) for n in steps]
        seen = encoded(png_bytes(to_uint8(ready.panels[-1][0]).cpu()))
        return {"answers": answers, "files": files, "seen": seen}

    def _answer(
        self, asked: AskedEdit, ready: prepared.PreparedEdit, steps: int | None, count: int,
        said: list[str],
    ) -> Answer:  # fmt: skip
        """Return the answer in so many steps, and the way to it."""
        begun = time.perf_counter()
        chosen = sampling.edit_plan(self.model.preset, steps, None, ready.levels)
        label = asked.label
        if label is None:
            label = sampling.best_class(self.model, ready.edit, chosen, asked.seed)
        way: list[Tensor] = []
        seeds = range(asked.seed, asked.seed + count)
        watched = replace(ready, edit=watching(ready.edit, way))
        images = to_uint8(prepared.run_prepared(watched, self.model, chosen, seeds, label)).cpu()
        about = prepared.provenance(asked.edit, self.model, chosen, asked.seed, label)
        more = [] if steps is None else ["--steps", str(steps)]
        name = "answer.png" if steps is None else f"answer-{steps}.png"
        return {
            "png": encoded(png_bytes(row(list(images)), about)),
            "command": self._command([*said, *more], name), "name": name,
            "steps": len(chosen.sigmas), "label": label,
            "seconds": time.perf_counter() - begun,
            "way": _shown_way(chosen.sigmas, [ready.canvas.unpad(x0) for x0 in way]),
        }  # fmt: skip

    def samples(self, asked: AskedSamples) -> Answer:
        """Return pictures of seeds, and the grid of them that `cmtool sample` makes."""
        self.check_model()
        seeds = list(range(asked.first, asked.first + asked.count))
        labels = self._labels(asked.label, seeds)
        chosen = sampling.plan(self.model.preset, None, asked.sigmas)
        device = str(sampling.model_device(self.model))
        begun = time.perf_counter()
        drawn = sampling.generate(
            self.model.f, self.model.preset, chosen, seeds, labels=labels, device=device
        )
        images = to_uint8(torch.cat(list(drawn))).cpu()
        text = f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
        about = sampling.provenance(self.model, chosen) | {"cmtool:seeds": text}
        said = ["sample", "--seeds", text, "--sigmas", _levels(asked.sigmas)]
        if asked.label is not None:
            said += ["--class", str(asked.label)]
        return {
            "grid": encoded(png_bytes(contact_sheet(images), about)),
            "command": self._command(said, "grid.png"),
            "pictures": [self._as_picture(image) for image in images],
            "labels": None if labels is None else labels.tolist(),
            "seconds": time.perf_counter() - begun,
        }  # fmt: skip

    def morph(self, asked: AskedMorph) -> Answer:
        """Return the pictures on the way between two seeds, and the animation of them."""
        self.check_model()
        if asked.label is not None:
            sampling.check_classes([asked.label], 1, self.model.preset.model.num_classes)
        chosen = sampling.plan(self.model.preset, None, asked.sigmas)
        ends = asked.start, asked.end
        frames = to_uint8(between_seeds(self.model, chosen, ends, asked.frames, asked.label)).cpu()
        said = ["edit", "interpolate", "--seeds", f"{asked.start},{asked.end}"]
        said += ["--frames", str(asked.frames), "--sigmas", _levels(asked.sigmas)]
        if asked.label is not None:
            said += ["--class", str(asked.label)]
        return {
            "pictures": [self._as_picture(frame) for frame in frames],
            "animation": encoded(animation_bytes(frames, ".webp")),
            "command": self._command(said, "morph.webp"),
        }  # fmt: skip

    def _labels(self, label: int | None, seeds: list[int]) -> Tensor | None:
        """Return a class for each seed, as `cmtool sample` chooses it. Raises UserError."""
        num = self.model.preset.model.num_classes
        if label is None:
            return seeded_labels(seeds, num) if num else None
        sampling.check_classes([label], 1, num)
        return torch.tensor([label]).expand(len(seeds))

    def _command(self, said: list[str], out: str) -> str:
        is_path = self.first_seen is not None and Path(self.name).exists()
        name = os.path.abspath(self.name) if is_path else self.name
        words = ["cmtool", *said, "-c", name, *self.options, "--out", out]
        return shlex.join(words)

    def _pixels(self, content: bytes) -> Tensor:
        """Return a picture (C, H, W) uint8. Raises InputError for too few or many bytes."""
        h, w = self.size
        if len(content) != h * w * self.channels:
            what = f"the picture has {len(content)} bytes, not {h * w * self.channels}"
            raise InputError(what, f"give {w}x{h} pixels of {self.channels} bytes")
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return pixels.reshape(h, w, self.channels).permute(2, 0, 1).contiguous()

    def _mask(self, content: bytes | None, edit: Row) -> Tensor | None:
        """Return a mask (1, H, W) uint8, 0 or 255, of an edit that has one. Raises UserError."""
        if edit.draws != "mask":
            return None
        h, w = self.size
        if content is None or len(content) != h * w:
            raise InputError(f"no mask of {w}x{h} pixels", "paint on the picture")
        mask = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(1, h, w) >= 128
        if not mask.any():
            raise UserError("nothing is painted", "paint over what is to be made anew")
        return mask.to(torch.uint8) * 255

    def _as_picture(self, image: Tensor) -> Answer:
        """Return a picture (C, H, W) uint8 as a PNG and as pixels."""
        image = image.cpu()
        pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
        return {"png": encoded(png_bytes(image)), "pixels": encoded(pixels)}


def weight_file_of(name: str, weights: str) -> Path:
    """Return the file of the weights that a model's name stands for. Hashes nothing.

    Of a run it is that of the newest checkpoint whose files have their sizes. Raises InputError
    where there is no model.
    """
    path = expanded(name)
    if (path / MANIFEST).is_file() and not (path / "checkpoints").is_dir():
        return sized(path, weights)[0].path
    if not (path / "checkpoints").is_dir():
        return find_model(name, weights).weights.path
    found, _ = newest(path / "checkpoints", lambda folder: sized(folder, weights)[0].path)
    if found is None:
        raise InputError(f"no checkpoint in {path}", "give a run folder or a checkpoint folder")
    return found


def encoded(content: bytes) -> str:
    """Return bytes as a text in base64."""
    return base64.standard_b64encode(content).decode()


def shown(sigma: float) -> float:
    """Return a noise level as it stands on the page and in a command."""
    return float(f"{sigma:.4g}")


def watching(edit: Edit, way: list[Tensor]) -> Edit:
    """Return the edit, which puts the first image of each x0 into `way` too."""

    def project(x0: Tensor) -> Tensor:
        kept = edit.project(x0)
        way.append(kept[:1])
        return kept

    return replace(edit, project=project)


def _shown_way(sigmas: tuple[float, ...], way: list[Tensor]) -> list[Answer]:
    """Return some of the answers on the way, from noisy to clean, with their noise levels."""
    steps = list(zip(sigmas, way[-len(sigmas) :], strict=True))
    stride = max(1, -(-len(steps) // SHOWN_ON_THE_WAY))
    chosen = steps[::-stride][::-1]
    return [
        {"sigma": shown(sigma), "png": encoded(png_bytes(to_uint8(x0[0]).cpu()))}
        for sigma, x0 in chosen
    ]


def _levels(sigmas: list[float]) -> str:
    return ",".join(f"{sigma!r}" for sigma in sigmas)


def _shown_amount(amount: Amount) -> Answer:
    """Return what the page has to know of the number of an edit."""
    return {
        "label": amount.label, "low": amount.low, "high": amount.high, "step": amount.step,
        "start": amount.start, "choices": amount.choices, "mayBeLeftOut": amount.may_be_left_out,
    }  # fmt: skip


def _amount(wanted: Amount | None, given: float | None) -> tuple[float, list[str]]:
    """Return the number of an edit, and how a shell says it. Raises UserError beyond its range.

    0 stands for a number that was left out.
    """
    if wanted is None:
        return 0.0, []
    if given is None:
        if wanted.may_be_left_out:
            return 0.0, []
        given = wanted.start
    what = f"{wanted.label}: {given:g}"
    if wanted.choices and given not in wanted.choices:
        raise UserError(what, f"give one of {', '.join(map(str, wanted.choices))}")
    if not wanted.low <= given <= wanted.high:
        raise UserError(what, f"give {wanted.low:g} to {wanted.high:g}")
    if wanted.step == 1 and given != int(given):
        raise UserError(what, "give a whole number")
    text = f"{given:g}"
    return float(text), [wanted.option, text]
