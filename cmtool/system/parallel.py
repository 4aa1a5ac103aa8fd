"""Models in several processes, replicated or sharded; their gradients are summed.

The loss of each microbatch is already divided by the number of microbatches of the step, so
gradients are summed, not averaged: two processes and two accumulation rounds are the same run.
Of a sharded model each process holds a part of every parameter, and what calls or copies it must
be done by all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmtool.core.tensors import local
from cmtool.system.dist import Group


def shared(module: nn.Module, group: Group) -> nn.Module:
    """Return the module so that its gradients are summed over the processes after backward."""
    learns = any(p.requires_grad for p in module.parameters())
    if group.world_size == 1 or group.mesh is not None or not learns:
        return module
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    # torch checks the annotations of a hook and accepts only its own; a lambda has none
    wrapped.register_comm_hook(None, lambda _, bucket: summed(bucket.buffer()))
    return wrapped


def summed(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Return a future of the sum of the gradients over the processes."""
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def shard(module: nn.Module, group: Group, blocks: Iterable[nn.Module]) -> None:
    """Shard a module over the processes, in place, block by block; do nothing without a mesh.

    Each of its `blocks`, and the rest of it, is whole only while it computes. Parameters stay
    float32, and autocast treats them like those of a replica, so that both are the same run. They
    travel in float32 too: FSDP's MixedPrecisionPolicy has one dtype for a whole block, so it would
    round norms, embeddings and inputs, which compute in float32. They become contiguous, as FSDP
    needs them. Make copies before, and an optimizer after.
    """
    if group.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)
    for part in [*blocks, module]:
        unit = fully_shard(part, mesh=group.mesh, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor put together from all processes; all must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, or this process's part of it, from the values of the whole tensor."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    for part, new in zip(local([tensor]), local([values]), strict=True):
        part.copy_(new)
