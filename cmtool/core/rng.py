"""Randomness that is a function of what it is for, so that nothing about it needs saving.

Training is keyed by (seed, step, shard), sampling by the seed of each image. Generators live on
the CPU: the same key gives the same numbers on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from cmtool.core.tensors import to_device


def keyed_generator(*key: int | str) -> Generator:
    """Return a CPU generator whose stream is a function of the key and of nothing else.

    The key is hashed to 32 bits, all that PyTorch's CPU generator keeps of a seed.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def step_generator(seed: int, step: int, shard: int) -> Generator:
    """Return the generator of one microbatch: `shard` is its place in the global batch."""
    return keyed_generator("step", seed, step, shard)


class SeededNoise:
    """Unit noise that belongs to images: row i is drawn from a generator of seeds[i] alone.

    A RandnLike. Image 17 gets the same noise in any batch, order or number of processes.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [keyed_generator("image", seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Return unit noise of the shape of `like` (B, C, H, W), B the number of seeds."""
        rows = [torch.randn(like.shape[1:], generator=g) for g in self.generators]
        return to_device(torch.stack(rows).to(like.dtype), like.device)


def seeded_labels(
    seeds: Sequence[int], num_classes: int, shares: Sequence[float] | None = None
) -> Tensor:
    """Return the class index that belongs to each seed, (B,) int64; it takes no noise.

    Classes are equally likely, or as likely as their `shares`, of which there are `num_classes`.
    """
    weights = None if shares is None else torch.tensor(shares, dtype=torch.float64)

    def draw(seed: int) -> Tensor:
        generator = keyed_generator("label", seed)
        if weights is None:
            return torch.randint(num_classes, (), generator=generator)
        return torch.multinomial(weights, 1, generator=generator)[0]

    return torch.stack([draw(seed) for seed in seeds])


@contextmanager
def seeded(generator: Generator) -> Iterator[None]:
    """Seed the global generators from `generator` inside the block, and put them back after it.

    PyTorch's dropout and its default initialisers take no generator; with `same_dropout`, this is
    the one place where global state is touched.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(seed)
        yield


@contextmanager
def same_dropout() -> Iterator[Callable[[], None]]:
    """Yield `replay`: calling it makes the next pass draw the dropout masks of the first.

    The state of the CPU generator and of every CUDA device in use is taken at entry; restoring
    the CPU's alone, as the released code does, shares nothing on CUDA.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def replay() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    yield replay
