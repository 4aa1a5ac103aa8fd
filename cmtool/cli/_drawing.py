"""What cmtool sample draws, and how it is written: a PNG each in a folder, or all in one file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.cli._archive import ARCHIVES, image_name, told, write_archive
from cmtool.cli._output import emit, say, write_bytes
from cmtool.cli._show import MOST
from cmtool.errors import InputError, ResourceError, Stopped, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from cmtool.cli._watching import OnProgress
    from cmtool.cli.sample import SampleOptions
    from cmtool.models import Model
    from cmtool.sampling import OnDrawn, Plan
    from cmtool.system.dist import Group


@dataclass(frozen=True)
class Drawing:
    """Images to draw, one a seed, by all processes together; uint8, on the CPU.

    `labels` (N,) are their classes, None for an unconditional model.
    """

    options: SampleOptions
    model: Model
    plan: Plan
    seeds: list[int]
    labels: Tensor | None
    device: str
    to_uint8: Callable[[Tensor], Tensor]
    group: Group
    progress: OnProgress | None = None
    drawn: list[Tensor] = field(default_factory=list)
    """The first images that this process drew, for --show."""

    def facts(self) -> dict[str, Any]:
        """Return what must be the same in all processes; other words may mean the same."""
        options, plan = self.options, self.plan
        return {
            "--out": str(Path(options.out)), "--batch": options.batch,
            "--seeds": _brief(self.seeds), "--rounding": options.rounding,
            "--json": options.as_json,
            "--overwrite": options.overwrite, "--no-metadata": options.no_metadata,
            "model": self.model.sha256, "kind": self.model.kind,
            "sampler": plan.sampler.model_dump(mode="json"), "sigmas": plan.sigmas,
            "--guidance": plan.guidance, "precision": plan.precision,
            "classes": _brief(self.classes()),
        }  # fmt: skip

    def draw(self, indices: Sequence[int], on_drawn: OnDrawn | None = None) -> Tensor:
        """Return some of the images (n, C, H, W), at least one, in one batch."""
        import torch

        from cmtool.sampling import generate

        seeds = [self.seeds[index] for index in indices]
        labels = None if self.labels is None else self.labels[list(indices)]
        drawn = generate(
            self.model.f, self.model.preset, self.plan, seeds, labels=labels,
            batch=self.options.batch, device=self.device, on_drawn=on_drawn,
        )  # fmt: skip
        images = self.to_uint8(torch.cat(list(drawn))).cpu()
        if self.options.show:
            self.drawn.extend(images[: max(0, MOST - len(self.drawn))])
        return images

    def some(self) -> list[Tensor]:
        """Return the first images (C, H, W), drawn now if they all were files before."""
        return self.drawn or list(self.draw(range(min(MOST, len(self.seeds)))))

    def rounds(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield this process's part of each round: at most a batch of the indices, in order."""
        batch = self.options.batch
        stride = batch * self.group.world_size
        for first in range(0, len(indices), stride):
            start = first + batch * self.group.rank
            yield indices[start : min(start + batch, first + stride)]

    def drawn_rounds(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor | None]]:
        """Yield this process's part of each round with its images, None for none; tell of each."""
        mine, done = sum(map(len, self.rounds(indices))), 0

        def tell(images: float, _: int) -> None:
            if self.progress is not None:
                self.progress("drawn", done + images, mine)

        for part in self.rounds(indices):
            yield part, self.draw(part, tell) if part else None
            done += len(part)

    def everything(self, first: int = 0) -> Iterator[Tensor]:
        """Yield the images (C, H, W) of all processes, in order from `first`, round by round."""
        import torch

        for _, drawn in self.drawn_rounds(range(first, len(self.seeds))):
            yield from torch.cat([part for part in self.group.gather(drawn) if part is not None])

    def classes(self) -> list[int] | list[None]:
        """Return the class of each image."""
        return [None] * len(self.seeds) if self.labels is None else self.labels.tolist()

    def key(self) -> str:
        """Return a hash of all that the pixels of the images depend on."""
        facts = [self.about(), self.options.rounding]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def about(self) -> list[dict[str, str]]:
        """Return what the PNG of each image says of how it was made."""
        from cmtool.sampling import provenance

        same = provenance(self.model, self.plan)
        infos = [{**same, "cmtool:seed": str(seed)} for seed in self.seeds]
        for info, label in zip(infos, self.classes(), strict=True):
            if label is not None:
                info["cmtool:class"] = str(label)
        return infos


def write_one_file(drawing: Drawing) -> dict[str, Any]:
    """Write all images into one zip, npz or grid; return what to say of it."""
    out = drawing.options.out
    if Path(out).suffix.lower() in ARCHIVES:
        write_archive(drawing)
    elif drawing.group.leads:
        _write_grid(out, drawing)
    else:
        for _ in drawing.everything():
            pass
    return {"path": out, "seeds": drawing.seeds} if drawing.group.leads else {}


def _write_grid(out: str, drawing: Drawing) -> None:
    import torch

    from cmtool.data.drawing import contact_sheet, png_bytes
    from cmtool.sampling import provenance

    picture = contact_sheet(torch.stack(list(drawing.everything())))
    about = provenance(drawing.model, drawing.plan) | {"cmtool:seeds": seed_ranges(drawing.seeds)}
    write_bytes(out, png_bytes(picture, {} if drawing.options.no_metadata else about))


def _brief(numbers: Sequence[int | None]) -> str:
    """Return a text that is another for other numbers: all of them, or their count and a hash."""
    if None in numbers:
        return "none"
    text = seed_ranges([number for number in numbers if number is not None])
    many = f"{len(numbers)} from {text[:20]}..., {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text if len(text) < 60 else many


def seed_ranges(seeds: list[int]) -> str:
    """Return seeds as --seeds takes them: "0-15,99"."""
    groups = groupby(enumerate(seeds), key=lambda pair: pair[1] - pair[0])  # equal in a range
    ranges = [[seed for _, seed in group] for _, group in groups]
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def write_folder(drawing: Drawing) -> dict[str, Any]:
    """Write a PNG for each image, and print its path when it is there; return records of all.

    Images that are there already are not drawn. Raises UserError, before any is drawn, for a file
    that holds another image.
    """
    from cmtool.data.drawing import png_bytes
    from cmtool.system.files import write_atomic

    options, infos = drawing.options, drawing.about()
    paths = [Path(options.out) / image_name(seed) for seed in drawing.seeds]
    missing = _missing(drawing, paths, infos)
    drawing.group.tell(None)  # all processes have looked before one of them writes
    records: list[dict[str, Any]] = []
    classes = drawing.classes()

    def record(indices: Sequence[int]) -> None:
        for index in indices:
            path, seed = str(paths[index]), drawing.seeds[index]
            records.append({"path": path, "seed": seed, "class": classes[index]})
            if not options.as_json:
                emit(path)

    record(sorted(set(range(len(paths))) - set(missing)))
    with told(lambda: len(records), len(paths), options.out):
        for indices, images in drawing.drawn_rounds(missing):
            written = 0
            try:
                for index, image in zip(indices, () if images is None else images, strict=True):
                    info = {} if options.no_metadata else infos[index]
                    write_atomic(paths[index], png_bytes(image, info))
                    written += 1
            except (ResourceError, Stopped):
                record(indices[:written])
                raise
            for part in drawing.group.gather(indices):
                record(part)
    return {"images": records} if drawing.group.leads else {}


def _missing(drawing: Drawing, paths: list[Path], infos: list[dict[str, str]]) -> list[int]:
    """Return the indices of the images to draw. Raises UserError for another image in a file.

    A file without metadata does not say what it holds: the first such image is drawn to compare.
    """
    from cmtool.data.decoding import png_info

    options, missing, is_compared = drawing.options, [], False
    for index, path in enumerate(paths):
        if options.overwrite or not path.exists():
            missing.append(index)
            continue
        info = png_info(path)
        is_same = info == infos[index]
        if not info and options.no_metadata:
            is_same = is_compared or _holds(path, drawing.draw([index])[0])
            is_compared = True
        if not is_same:
            what = f"{path} holds another image than this command makes"
            raise UserError(what, "give another --out, or --overwrite")
    if len(missing) < len(paths):
        say(f"{len(paths) - len(missing)} of {len(paths)} images are there already")
    return missing


def _holds(path: Path, image: Tensor) -> bool:
    """Tell whether a file holds this image (C, H, W)."""
    import torch

    from cmtool.data.decoding import read_image

    try:
        return torch.equal(read_image(path, mode="RGB" if len(image) == 3 else "L"), image)
    except InputError:
        return False
