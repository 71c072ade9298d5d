"""The few collectives that the engine needs itself; everything else is DeepSpeed's."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from gkd.config import Launch
from gkd.errors import MachineError, PartError
from gkd.serving.threads import in_thread
from gkd.train.heartbeat import heartbeat

T = TypeVar("T")
# For what the main rank may do alone for hours: sampling the teacher's texts, hashing a checkpoint. The group of all
# collectives gives up after minutes, as it should when a rank hangs; of this one `ranks_heard` finds a rank that does
# not run.
_PATIENCE = timedelta(days=7)
_MEETING = timedelta(minutes=10)  # ranks may start minutes apart
_TORCH_IS_LATE = 1.1  # times its own limit: what it knows of the reason is better
_patient_group: Any = None  # of all ranks; None is the group of all collectives


def compute_device(launch: Launch) -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", launch.local_rank)
    return torch.device("cpu")


def load_deepspeed() -> Any:
    """The module, quiet, and told where there is no GPU.

    It would compile a shared-memory collective library on CPU (about a minute) that ZeRO never calls.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # it warns of torch's own AdamW ("untested"), of inputs that are no plain tensors, and of its own collectives
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(launch: Launch) -> None:
    """Joins the process group that the launcher described; without a launcher, makes a group of one.

    Raises MachineError if the other ranks are not found.
    """
    deepspeed, on_gpu = load_deepspeed(), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch.local_rank)
    backend = "nccl" if on_gpu else "gloo"
    if launch.world_size == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not dist.is_initialized():
        # alone: no address and no port, which what this process starts later would inherit, and find the port taken
        store = dist.HashStore() if launch.world_size == 1 else meet(launch, _MEETING)  # pyright: ignore
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if launch.world_size > 1:
        global _patient_group
        _patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def meet(launch: Launch, limit: timedelta) -> Any:
    """The store by which the ranks find one another. Raises MachineError if that takes longer than `limit`.

    torch bounds how long it takes to connect, but waits without end for a word of a port that is somebody else's.
    """
    limit_s = limit.total_seconds()
    store = in_thread(lambda: next(rendezvous("env://", launch.rank, launch.world_size, timeout=limit))[0])
    try:
        return store.result(_TORCH_IS_LATE * limit_s)
    except TimeoutError:
        reason = "who listens there says nothing"
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
    raise MachineError(
        f"rank {launch.rank} has not found the others within {limit_s:g} s: {reason}; is {launch.meeting_point} "
        "(MASTER_ADDR, MASTER_PORT) rank 0's machine, and a port that nobody else uses?"
    )


def ranks_heard(launch: Launch, limit_s: float, on_silence: Callable[[str], None]) -> AbstractContextManager[None]:
    """Inside, of several ranks, one that does not run for `limit_s` is noticed by another: see `heartbeat`."""
    if launch.world_size == 1:
        return nullcontext()
    return heartbeat(
        dist.distributed_c10d._get_default_store(),
        rank=launch.rank,
        ranks=launch.world_size,
        limit_s=limit_s,
        on_silence=on_silence,
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place; the same result on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def sum_all(values: Sequence[float]) -> list[float]:
    """Sums a few plain numbers over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized() and dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    return sum_over_ranks(tensor).tolist()


def all_ranks_rows(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The rows of all ranks, in their order, on every rank; and where among them its own are."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, slice(0, len(rows))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    start = sum(len(part) for part in parts[: dist.get_rank()])
    return torch.cat(parts).to(rows.device), slice(start, start + len(rows))


def max_over_ranks(value: float) -> float:
    """A NaN on any rank gives NaN on all (an all-reduce by MAX could lose it)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return float("nan") if any(v != v for v in values) else max(values)


def largest_count(count: int) -> int:
    """The largest of the ranks' counts."""
    return int(max_over_ranks(count))


def from_main(value: T | None) -> T:
    """The main rank's value, on every rank, however long it takes. Nobody passes before the main rank has it."""
    box = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_patient_group)
    return box[0]  # pyright: ignore[reportReturnType]


def together(call: Callable[[], T]) -> T:
    """What `call` returns. If it raises a PartError on any rank, that is raised on all. Collective, after it."""
    try:
        result, error = call(), None
    except PartError as raised:
        result, error = None, raised
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=_patient_group)
        rank, first = next(((rank, e) for rank, e in enumerate(errors) if e is not None), (0, None))
        if error is None and first is not None:
            error = type(first)(f"rank {rank}: {first}", is_temporary=first.is_temporary)
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def barrier() -> None:
    """Waits for all ranks, however long one takes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=_patient_group)


class Neighbours:
    """Every `count` consecutive ranks, from the first on; to be made by all ranks together."""

    def __init__(self, count: int) -> None:
        """`count` divides the number of ranks."""
        self._count, self.place = count, dist.get_rank() % count
        first_ranks = range(0, dist.get_world_size(), count)
        groups = {first: dist.new_group(range(first, first + count), backend="gloo") for first in first_ranks}
        self._group = groups[dist.get_rank() - self.place]

    def gather(self, value: T) -> list[T]:
        """What all of them gave, in the order of their ranks; `place` is this one's."""
        values: list[Any] = [None] * self._count
        dist.all_gather_object(values, value, group=self._group)
        return values


def end_process() -> None:
    """Leaves the process group after a last barrier and, on one rank of several, ends the process with code 0.

    Without the interpreter's teardown: a few in a hundred ranks whose work was done aborted there, on busy cores. The
    message fits a gloo thread that lets go of its last tensor too late: Python ends a thread that then asks for the
    interpreter's lock in a way that C++ answers with an abort.
    """
    if not dist.is_initialized():
        return
    several = dist.get_world_size() > 1
    barrier()
    dist.destroy_process_group()
    if several:
        atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]  # what libraries flush and close
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
