"""Several processes of one run: they decide together, and learn why another one ended.

In a single process nothing happens. parallel.py spreads models and gradients over them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

# import it before there is a group: its functions keep the group as a default value
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from cmtool.errors import DivergedError, Paused, ResourceError, Stopped, UserError
from cmtool.system.alike import Facts, check_alike, check_apart, check_over_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

JOIN_TIMEOUT = 300.0
"""Seconds to wait for processes that have not started."""
PATIENCE = 3600.0
"""Seconds the leading process may draw, evaluate or write while the others wait."""
MARGIN = 60.0
"""Seconds that NCCL waits longer: when it gives up, it ends the process without a message."""
STORE_TIMEOUT = 2.0
"""Seconds to wait for the store, which may be gone."""
POLL = 0.02
STDOUT = 1
"""The file descriptor, which libraries in C++ write to."""
LETTING_GO = 0.1
"""Seconds for gloo's threads to let go of their tensors."""
LOST = ("timed out", "connection closed", "connection reset", "connection refused", "broken pipe",
        "read error", "heartbeat", "nccl", "gloo", "socket")  # fmt: skip
"""Messages of torch when another process is gone; it has no exception for that."""
RESUME = "see which process ended first, and why; then run the same command with --resume"

T = TypeVar("T")


class Group(NamedTuple):
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    """Where processes leave messages for each other; it outlives each of them."""
    talk: dist.ProcessGroup | None = None
    """The group over which numbers on the CPU travel; None is the default group."""
    mesh: DeviceMesh | None = None
    """The mesh over which models are sharded; None replicates them."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def has_models(self) -> bool:
        """Whether this process takes part in work on a model between steps."""
        return self.leads or self.mesh is not None

    def any(self, number: int) -> int:
        """Return the largest of the numbers that the processes give."""
        if self.world_size == 1:
            return number
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.talk)
        return int(flag)

    def line_up(self) -> None:
        """Wait, where GPUs compute, until all processes have queued the work of a step.

        So the error names a process that hangs: NCCL would end this one without a message.
        """
        if self.talk is not None:
            self.any(0)

    def sum(self, values: Tensor) -> Tensor:
        """Return, on the CPU, the sum of the values that the processes give."""
        total = values.cpu()
        if self.world_size > 1:
            dist.all_reduce(total, group=self.talk)
        return total

    def tell(self, what: T) -> T:
        """Return the value of the leading process."""
        if self.world_size == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]

    def gather(self, what: T) -> list[T]:
        """Return the value of each process, by rank."""
        if self.world_size == 1:
            return [what]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, what, group=self.talk)
        return box

    def agreed(self, action: Callable[[], T], name: str) -> T:
        """Return the result of an action of the leading process; all raise what it raises."""
        done = _outcome(action) if self.leads else None
        self.meet(name)
        return _returned(self.tell(done))  # type: ignore[return-value]  # never None: the leading process has one

    def together(self, action: Callable[[], T], name: str) -> T:
        """Return the result of an action that all processes do; if one fails, all raise its error.

        The leading process adds the rank to the error, unless all raised the same.
        """
        done = _outcome(action)
        if self.store is not None:
            self.store.set(f"{name}/{self.rank}", "")
            self._await([f"{name}/{rank}" for rank in range(self.world_size)])
        errors = self.gather(done if isinstance(done, UserError) else None)
        for rank, error in enumerate(errors):
            if error is not None:
                alike = all(other is not None and other.what == error.what for other in errors)
                error.rank = None if alike or not self.leads else rank
                raise error
        return _returned(done)

    def alike(self, facts: Callable[[], Facts], name: str) -> None:
        """Raise UserError in all processes if what they say of themselves differs."""
        found = self.gather(self.together(facts, name))
        check_alike(found)

    def meet(self, name: str) -> None:
        """Wait until the leading process is here too; each meeting has a name of its own.

        A collective would time out while the leading process draws or writes.
        """
        if self.store is not None and self.leads:
            self.store.set(name, "")
        elif self.store is not None:
            self._await([name])

    def _await(self, keys: list[str]) -> None:
        """Wait until others have set keys. Raises ResourceError if one fails, or after an hour."""
        assert self.store is not None
        end = time.monotonic() + PATIENCE
        while not self.store.check(keys):
            if (failure := self.failure()) is not None or time.monotonic() > end:
                raise ResourceError(failure or "another process does not continue", RESUME)
            time.sleep(POLL)

    def confess(self, failure: str) -> None:
        """Leave a message about what ends this process, unless another process has."""
        if (store := self.store) is not None:
            _try_for(lambda: store.compare_set("failure", "", failure))

    def failure(self) -> str | None:
        """Return what ended the first process that failed, if it left a message."""
        store = self.store
        if store is None or not _try_for(lambda: store.check(["failure"])):
            return None
        return _try_for(lambda: store.get("failure").decode())


ALONE = Group()


def _outcome(action: Callable[[], T]) -> T | UserError:
    """Return what an action returns, or the UserError it raises."""
    try:
        return action()
    except UserError as error:
        return error


def _returned(outcome: T | UserError) -> T:
    """Return an outcome, or raise it."""
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _try_for(action: Callable[[], T]) -> T | None:
    """Return what an action on the store returns; None if it fails or takes long."""
    box: list[T] = []

    def act() -> None:
        with suppress(RuntimeError):  # the store is gone as well
            box.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT)
    return box[0] if box else None


def join(
    rank: int,
    world_size: int,
    device: str,
    timeout: float,
    *,
    sharded: bool = False,
    facts: Facts | None = None,
) -> Group:
    """Join the processes that torchrun started; `sharded` models are spread over them.

    The `facts` say what this process is about to do. Raises UserError if another one differs.

    `timeout` seconds without an answer is a failure. Numbers travel over gloo on CPUs, gradients
    of a GPU over NCCL, whose watchdog ends a process that waits a minute longer. Raises
    ResourceError when not all processes are there after five minutes, or when they cannot reach
    each other.
    """
    if world_size == 1:
        return Group(rank, world_size)
    try:
        found, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT))))
    except ValueError as error:  # MASTER_ADDR or MASTER_PORT is not set, or is none
        what = f"the processes cannot find each other: {str(error)[-200:]}"
        raise UserError(what, "start all of them with torchrun") from None
    on_gpu = device.startswith("cuda")
    try:
        store = assemble(found, rank, world_size)
        check_over_store(store, rank, world_size, facts or {})
        check_apart(store, rank, world_size, gpu_name(device) if on_gpu else "")
    except dist.DistStoreError:
        what = f"not all of {world_size} processes are there after {JOIN_TIMEOUT:.0f} s"
        raise ResourceError(what, "read the messages of the other processes") from None
    patience = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    longer = patience + timedelta(seconds=MARGIN) if on_gpu else patience
    try:
        with no_stdout():
            dist.init_process_group(
                backend, timeout=longer, store=store, rank=rank, world_size=world_size
            )
            talk = dist.new_group(backend="gloo", timeout=patience) if on_gpu else None
    except RuntimeError as error:
        what = f"the processes cannot reach each other: {str(error).splitlines()[0][:200]}"
        hint = "on several nodes, name the network interface that joins them: GLOO_SOCKET_IFNAME"
        raise ResourceError(what, hint) from error
    assert not isinstance(talk, int)  # what processes outside a group get
    if not sharded:
        return Group(rank, world_size, store, talk)
    from torch.distributed.device_mesh import init_device_mesh  # as below: it takes a second

    with no_stdout():
        mesh = init_device_mesh(torch.device(device).type, (world_size,))
    return Group(rank, world_size, store, talk, mesh)


@contextmanager
def no_stdout() -> Iterator[None]:
    """Drop what a library prints on stdout meanwhile: stdout is for a command's result.

    gloo of torch 2.8 says there, from C++, how many processes it is connected to.
    """
    kept = os.dup(STDOUT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)


def gpu_name(device: str) -> str:
    """Return a name that no other GPU has: its machine, its place there, and its own number."""
    index = torch.device(device).index or 0
    return f"{socket.gethostname()}/{index}/{torch.cuda.get_device_properties(index).uuid}"


def assemble(store: Store, rank: int, world_size: int) -> Store:
    """Return a part of the store for this start alone, when all processes are there.

    torchrun keeps one store over restarts, with the addresses of processes that are gone. So each
    process leaves a name that was never used before, and the leading process answers that name.
    """
    name = uuid.uuid4().hex
    patience = timedelta(seconds=JOIN_TIMEOUT)
    store.set(f"cmtool/arrived/{rank}", name)
    if rank:
        store.wait([f"cmtool/answer/{name}"], patience)
        own = PrefixStore(store.get(f"cmtool/answer/{name}").decode(), store)
        own.set(f"here/{rank}", "")
        own.wait(["all here"], patience)
        return own
    own = PrefixStore(name, store)
    end = time.monotonic() + JOIN_TIMEOUT
    while missing := [r for r in range(1, world_size) if not own.check([f"here/{r}"])]:
        if time.monotonic() > end:
            raise dist.DistStoreError
        for other in missing:
            if store.check([f"cmtool/arrived/{other}"]):
                arrived = store.get(f"cmtool/arrived/{other}").decode()
                store.set(f"cmtool/answer/{arrived}", name)
        time.sleep(POLL)
    own.set("all here", "")
    return own


def leave() -> None:
    """Leave the group, if there is one.

    That ends gloo's threads, unless something keeps the group, as torch's caches of sharded
    tensors do. A thread that asks for the GIL while Python ends, to free the tensors of its last
    work, aborts the process (pytorch/pytorch#179291): so this waits until it has freed them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LETTING_GO)


@contextmanager
def contact(group: Group, step: Callable[[], int]) -> Iterator[None]:
    """Tell the other processes what ends this one.

    Raises ResourceError that says what ended another process, when that is gone. An error of this
    process alone gets its rank.
    """
    try:
        yield
    except (Stopped, Paused):  # all processes agreed on it
        raise
    except UserError as error:
        if not isinstance(error, DivergedError):  # all processes diverge
            error.rank = group.rank
        group.confess(f"rank {group.rank} failed after step {step()}: {error.what}")
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and (lost := lost_contact(error, group, step())):
            raise lost from error
        if group.world_size > 1:
            error.add_note(f"in rank {group.rank}, after step {step()}")
        group.confess(f"rank {group.rank} failed after step {step()}: {error!r}")
        raise


def lost_contact(error: RuntimeError, group: Group, step: int) -> ResourceError | None:
    """Return the error to show if torch's error means that another process is gone."""
    sign = next((sign for sign in LOST if sign in str(error).lower()), None)
    if group.world_size == 1 or sign is None:
        return None
    silent = f"no contact with another process after step {step}: {sign}"
    lost = ResourceError(group.failure() or silent, RESUME)
    lost.rank = group.rank
    return lost
