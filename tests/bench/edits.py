"""Edits of held-out pictures against the truth: `python -m tests.bench.edits MODEL [STEPS ...]`.

200 pictures of the model's bundled data. Each edit is given the picture's class, and compared with
the trivial answer: root mean squared error on a scale of 2; of colours (what is left when each
pixel's luma is taken away) for colorize. Prints a table in Markdown.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

import cmtool
from cmtool.core.edits import block_means, blur, enlarged, gaussian_kernel, luma
from cmtool.data.datasets import load_dataset
from cmtool.data.images import from_uint8, to_uint8

PICTURES = 200
SIGMA, BLUR = 0.3, 1.0


class Task(NamedTuple):
    """What an edit is given, how it is called, the trivial answer, and what is compared."""

    given: Callable
    edit: Callable
    plain_name: str
    plain: Callable
    seen: Callable = lambda x: x


def right_half(x):
    mask = torch.zeros_like(x[:, :1], dtype=torch.bool)
    mask[..., x.shape[-1] // 2 :] = True
    return mask


def middle(x):
    """A box of half the side, in the middle."""
    side = x.shape[-1]
    mask = torch.zeros_like(x[:, :1], dtype=torch.bool)
    mask[..., side // 4 : -side // 4, side // 4 : -side // 4] = True
    return mask


def mean_filled(x, mask_of):
    """The pixels that are masked filled with the mean of the others."""
    mask = mask_of(x)
    known = (x * ~mask).sum((2, 3), keepdim=True) / (~mask).sum((2, 3), keepdim=True)
    return torch.where(mask, known, x)


def colours(x):
    return x - luma(x)


def noisy(x):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x + SIGMA * noise


def tasks():
    edit, kernel = cmtool.edit, gaussian_kernel(BLUR)

    def bicubic(factor, low):
        return F.interpolate(low, scale_factor=factor, mode="bicubic", antialias=False).clamp(-1, 1)

    rows = {
        f"inpaint {title}": Task(
            lambda x: x, partial(lambda m, x, of, **o: edit.inpaint(m, x, of(x), **o), of=mask_of),
            "mean of the rest", partial(mean_filled, mask_of=mask_of),
        )
        for title, mask_of in (("the middle", middle), ("the right half", right_half))
    }  # fmt: skip
    for factor in (2, 4):
        given = partial(block_means, factor=factor)
        larger = partial(lambda m, x, f, **o: edit.superres(m, x, f, **o), f=factor)
        for name, plain in (("repeated pixels", lambda x, f=factor: enlarged(x, f)),
                            ("bicubic", partial(bicubic, factor))):  # fmt: skip
            rows[f"superres {factor}, {name}"] = Task(given, larger, name, plain)
    return rows | {
        f"denoise, sigma {SIGMA}": Task(
            noisy, lambda m, x, steps=None, **o: edit.denoise(m, x, SIGMA, **o), "as it is",
            lambda x: x.clamp(-1, 1),
        ),
        f"deblur, Gaussian of {BLUR:g} pixel": Task(
            lambda x: from_uint8(to_uint8(blur(x, kernel))),
            lambda m, x, **o: edit.deblur(m, x, kernel, **o), "as it is", lambda x: x,
        ),
        "colorize": Task(
            luma, lambda m, x, **o: edit.colorize(m, x, **o), "grey",
            lambda x: x.expand(-1, 3, -1, -1), colours,
        ),
    }  # fmt: skip


def error(seen, answer, truth):
    gap = seen(answer.double()) - seen(truth.double())
    return gap.square().mean().sqrt().item()


def main(name, *steps):
    model = cmtool.load_model(name)
    data = load_dataset(f"{model.bundled_data}:held-out")
    picked = torch.linspace(0, len(data) - 1, PICTURES).round().long()
    truth, labels = from_uint8(data.images[picked]), data.labels[picked]
    numbers = [int(n) for n in steps] or [None]
    print("| edit |", *(f"{n or 'default'} steps |" for n in numbers), "plain answer | its error |")
    print("|---" * (len(numbers) + 3) + "|")
    for title, task in tasks().items():
        given, errors = task.given(truth), []
        for n in numbers:
            answers = torch.empty_like(truth)
            for label in labels.unique().tolist():
                mine = labels == label
                where = {"label": label} if model.preset.model.num_classes else {}
                answers[mine] = task.edit(model, given[mine], steps=n, **where)
            errors.append(error(task.seen, answers, truth))
        plain = error(task.seen, task.plain(given), truth)
        figures = " | ".join(f"{e:.3f}" for e in errors)
        print(f"| {title} | {figures} | {task.plain_name} | {plain:.3f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
