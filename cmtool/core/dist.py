"""Training in several processes: gradients summed, decisions agreed on; in one, nothing happens.

The loss of each microbatch is already divided by the number of microbatches of the step, so
gradients are summed, not averaged: two processes and two accumulation rounds are the same run.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmtool.errors import ResourceError

LOST = ("timed out", "connection closed", "connection reset", "broken pipe", "heartbeat", "nccl",
        "gloo", "socket")  # fmt: skip
"""What torch says when another process is gone; it has no exception of its own for it."""


class Group(NamedTuple):
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, number: int) -> int:
        """Return the largest of the numbers that the processes give."""
        if self.world_size == 1:
            return number
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def sum(self, values: Tensor) -> Tensor:
        """Return, on the CPU, the sum of the values that the processes give."""
        total = values.cpu()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def tell(self, what: Any) -> Any:
        """Return what the leading process gives."""
        if self.world_size == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, what: Any) -> list[Any]:
        """Return what each process gives, by rank."""
        if self.world_size == 1:
            return [what]
        box = [None] * self.world_size
        dist.all_gather_object(box, what)
        return box


ALONE = Group()


def join(rank: int, world_size: int, device: str, timeout: float) -> Group:
    """Join the processes that torchrun started. `timeout` seconds without an answer is a failure.

    Numbers travel over gloo on CPUs, gradients of a GPU over NCCL.
    """
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Group(rank, world_size)


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shared(module: nn.Module, group: Group) -> nn.Module:
    """Return the module so that its gradients are summed over the processes after backward."""
    if group.world_size == 1:
        return module
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    # torch reads a hook's annotations and takes none but its own: hence a lambda
    wrapped.register_comm_hook(None, lambda _, bucket: summed(bucket.buffer()))
    return wrapped


def summed(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Return, when it is there, the sum of the gradients over the processes."""
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def lost_contact(error: RuntimeError, group: Group, step: int) -> ResourceError | None:
    """Return the error to show when torch's means that another process is gone, else None."""
    text = str(error).lower()
    if group.world_size == 1 or not any(sign in text for sign in LOST):
        return None
    lost = ResourceError(
        f"no contact with another process after step {step}: {str(error).splitlines()[0][:200]}",
        "see the first rank that failed; then run the same command with --resume",
    )
    lost.rank = group.rank
    return lost
