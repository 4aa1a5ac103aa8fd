"""What a run says, and what it leaves behind, when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cmtool.data.images import png_bytes
from cmtool.errors import ResourceError
from cmtool.formats.native import write_weights
from cmtool.system import dist
from cmtool.system.devices import is_out_of_memory
from cmtool.system.files import write_atomic, write_json
from cmtool.training.fit import Diverged
from cmtool.training.plots import picture
from cmtool.training.setup import Run


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Where torch's error means no more memory, or a lost process, raise one that says so."""
    with dist.contact(run.group, lambda: run.state.step):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, run) from None


def out_of_memory(error: Exception, run: Run) -> ResourceError:
    """Return the error to show for one that means there is no more memory."""
    t, group = run.preset.train, run.group
    parts = range(t.accumulate + 1, t.batch + 1)
    more = next((n for n in parts if t.batch % (n * group.world_size) == 0), None)
    remedies = [
        f"split the batch: --accumulate {more}" if more is not None else "lower train.batch",
        *([] if t.checkpoint_activations else ["--set train.checkpoint_activations=true"]),
        *(["--set run.sharding=fsdp"] if group.world_size > 1 and group.mesh is None else []),
    ]
    reason = str(error).splitlines()[0] if str(error) else "MemoryError"
    step, images = run.state.step, t.batch // t.accumulate // group.world_size
    return ResourceError(
        f"out of memory after step {step}, with {images} images at a time: {reason[:200]}",
        f"{', or '.join(remedies)}; the last checkpoint is intact",
    )


def with_dump(error: Diverged, run: Run) -> Diverged:
    """Return the error after writing down the batch it happened with; its hint says where."""
    try:
        folder = write_failure(error, run)
    except (OSError, ResourceError, SafetensorError) as reason:
        error.hint += f"; the batch of this step cannot be written: {reason}"
    else:
        error.hint += f", and the batch of this step is in {folder}"
    return error


def write_failure(error: Diverged, run: Run) -> Path:
    """Write the batch of the step at which a run diverged, and return its folder.

    fault.json says what was not finite and gives the key (seed, step, shard) of each microbatch's
    randomness, batch.safetensors has x0, labels, sigma and loss, images.png shows x0. It is no
    checkpoint. The leading process has the folder, each other process a folder within it.
    """
    info, batch = error.info, error.batch
    folder = run.out / "failed" / f"step-{info.step:07d}"
    if not run.group.leads:
        folder = folder / f"rank-{run.group.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x0": batch.x0, "sigma": batch.sigma, "loss": batch.loss}
    tensors |= {} if batch.labels is None else {"labels": batch.labels}
    write_weights(folder / "batch.safetensors", tensors, {"step": info.step})
    write_atomic(folder / "images.png", png_bytes(picture(batch.x0.cpu(), 16)))
    facts = {
        "error": error.what,
        "step": info.step,
        "keys": [[run.preset.train.seed, info.step - 1, shard] for shard in batch.shards],
        "lr": info.lr,
        "n": info.n,
        "mu": info.mu,
        "precision": run.preset.train.precision,
    }
    write_json(folder / "fault.json", facts)
    return folder
