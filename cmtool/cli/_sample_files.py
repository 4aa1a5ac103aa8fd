"""Where `cmtool sample` puts its images: a PNG each in a folder, or all in one grid, zip or npz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.cli._output import emit, say, write_bytes
from cmtool.errors import ResourceError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from cmtool.models import Model
    from cmtool.sampling import Plan
    from cmtool.system.dist import Group


@dataclass(frozen=True)
class Drawing:
    """Images to draw, one a seed, by all processes together; uint8, on the CPU.

    `labels` (N,) are their classes, None for an unconditional model.
    """

    model: Model
    plan: Plan
    seeds: list[int]
    labels: Tensor | None
    batch: int
    device: str
    to_uint8: Callable[[Tensor], Tensor]
    metadata: bool
    group: Group

    def draw(self, indices: Sequence[int]) -> Tensor:
        """Return some of the images (n, C, H, W), at least one, in one batch."""
        import torch

        from cmtool.sampling import generate

        seeds = [self.seeds[index] for index in indices]
        labels = None if self.labels is None else self.labels[list(indices)]
        drawn = generate(
            self.model.f, self.model.preset, self.plan, seeds, labels=labels, batch=self.batch,
            device=self.device,
        )  # fmt: skip
        return self.to_uint8(torch.cat(list(drawn))).cpu()

    def rounds(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield this process's part of each round: at most a batch of the indices, in order."""
        stride = self.batch * self.group.world_size
        for first in range(0, len(indices), stride):
            start = first + self.batch * self.group.rank
            yield indices[start : min(start + self.batch, first + stride)]

    def everything(self) -> Iterator[Tensor]:
        """Yield the images (C, H, W) of all processes, in order, round by round."""
        import torch

        for indices in self.rounds(range(len(self.seeds))):
            drawn = self.draw(indices) if indices else None
            yield from torch.cat([part for part in self.group.gather(drawn) if part is not None])

    def classes(self) -> list[int] | list[None]:
        """Return the class of each image."""
        return [None] * len(self.seeds) if self.labels is None else self.labels.tolist()

    def about(self) -> list[dict[str, str]]:
        """Return what the PNG of each image says of how it was made."""
        from cmtool.sampling import provenance

        same = provenance(self.model, self.plan)
        infos = [{**same, "cmtool:seed": str(seed)} for seed in self.seeds]
        for info, label in zip(infos, self.classes(), strict=True):
            if label is not None:
                info["cmtool:class"] = str(label)
        return infos


def write_one_file(out: str, drawing: Drawing) -> dict[str, Any]:
    """Write all images into one zip, npz or grid; return what to say of it."""
    if not drawing.group.leads:
        for _ in drawing.everything():
            pass
        return {}
    write = {".zip": _write_zip, ".npz": _write_npz}.get(Path(out).suffix.lower(), _write_grid)
    write(out, drawing)
    return {"path": out, "seeds": drawing.seeds}


def _write_zip(out: str, drawing: Drawing) -> None:
    from cmtool.data.archives import write_zip
    from cmtool.data.images import png_bytes

    names = map(image_name, drawing.seeds)
    infos = drawing.about() if drawing.metadata else [{}] * len(drawing.seeds)
    files = map(png_bytes, drawing.everything(), infos)
    write_zip(Path(out), zip(names, files, drawing.classes(), strict=True))


def _write_npz(out: str, drawing: Drawing) -> None:
    from cmtool.data.archives import write_npz

    classes = None if drawing.labels is None else drawing.classes()
    write_npz(Path(out), drawing.everything(), len(drawing.seeds), classes)


def _write_grid(out: str, drawing: Drawing) -> None:
    import torch

    from cmtool.data.images import contact_sheet, png_bytes
    from cmtool.sampling import provenance

    picture = contact_sheet(torch.stack(list(drawing.everything())))
    about = provenance(drawing.model, drawing.plan) | {"cmtool:seeds": seed_ranges(drawing.seeds)}
    write_bytes(out, png_bytes(picture, about if drawing.metadata else {}))


def image_name(seed: int) -> str:
    """Return the file name of a seed's image."""
    return f"seed{seed:06d}.png"


def seed_ranges(seeds: list[int]) -> str:
    """Return seeds as --seeds takes them: "0-15,99"."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def write_folder(
    folder: Path, drawing: Drawing, *, overwrite: bool, print_paths: bool
) -> dict[str, Any]:
    """Write a PNG for each image, and print its path when it is there; return records of all.

    Images that are there already are not drawn. Raises UserError, before any is drawn, for a file
    that holds another image.
    """
    from cmtool.data.images import png_bytes
    from cmtool.system.files import write_atomic

    infos = drawing.about()
    paths = [folder / image_name(seed) for seed in drawing.seeds]
    missing = _missing(paths, infos, drawing, overwrite)
    drawing.group.tell(None)  # all processes have looked before one of them writes
    records: list[dict[str, Any]] = []
    classes = drawing.classes()

    def record(indices: Sequence[int]) -> None:
        for index in indices:
            path, seed = str(paths[index]), drawing.seeds[index]
            records.append({"path": path, "seed": seed, "class": classes[index]})
            if print_paths:
                emit(path)

    record(sorted(set(range(len(paths))) - set(missing)))
    for indices in drawing.rounds(missing):
        images = drawing.draw(indices) if indices else ()
        written = 0
        try:
            for index, image in zip(indices, images, strict=True):
                info = infos[index] if drawing.metadata else {}
                write_atomic(paths[index], png_bytes(image, info))
                written += 1
        except ResourceError as error:
            record(indices[:written])
            what = f"{error.what}: {len(records)} of {len(paths)} images are there"
            hint = f"{error.hint}; then the same command draws the rest"
            raise ResourceError(what, hint) from None
        for part in drawing.group.gather(indices):
            record(part)
    return {"images": records} if drawing.group.leads else {}


def _missing(
    paths: list[Path], infos: list[dict[str, str]], drawing: Drawing, overwrite: bool
) -> list[int]:
    """Return the indices of the images to draw. Raises UserError for another image in a file."""
    from cmtool.data.images import png_info

    missing = []
    for index, path in enumerate(paths):
        if overwrite or not path.exists():
            missing.append(index)
        elif drawing.metadata and png_info(path) != infos[index]:
            what = f"{path} holds another image than this command makes"
            raise UserError(what, "give another --out, or --overwrite")
    if len(missing) < len(paths):
        say(f"{len(paths) - len(missing)} of {len(paths)} images are there already")
    return missing
