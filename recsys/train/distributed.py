"""Processes that train together: who am I, wait for the others, gather uneven rows, start them."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.errors import RecsysError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the R that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def join_world(accelerator: str) -> World:
    """Join the processes that `launch` (or torchrun) started; alone when none were."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(world.local_rank)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=2))
    return world


def leave_world() -> None:
    """Close the connections to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def led(world: World, work: Callable[[], T]) -> T | None:
    """Let the first process of each machine work while the others wait; its error stops them all.

    Returns:
        What `work` returned, where it ran; None elsewhere.
    """
    result, failure = None, None
    if world.local_rank == 0:
        try:
            result = work()
        except RecsysError as error:
            failure = error
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        failures = torch.tensor([failure is not None], dtype=torch.int32, device=device)
        dist.all_reduce(failures)
        if failure is None and int(failures):
            # The process that failed tells the user; the others only stop.
            raise SystemExit(1)
    if failure is not None:
        raise failure
    return result


def gather_rows(local: Tensor) -> Tensor:
    """Concatenate the ranks' rows in rank order: `[n_r, ...] -> [Σ n_r, ...]`, nothing padded, nothing dropped.

    The ranks may bring different numbers of rows, none included.
    """
    if not dist.is_initialized():
        return local
    size = dist.get_world_size()
    count = torch.tensor([local.shape[0]], dtype=torch.int64, device=local.device)
    counts = [torch.zeros_like(count) for _ in range(size)]
    dist.all_gather(counts, count)
    rows = [int(c) for c in torch.cat(counts).tolist()]
    padded = local.new_zeros((max(rows), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; every rank must ask."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(flags)
    return bool(flags)


def average_buffers(module: nn.Module) -> None:
    """Give every rank the mean of the ranks' floating-point buffers, such as the statistics of batch norm.

    Each rank updates its own from its own rows; scoring must not depend on which rank a row falls to.
    """
    if not dist.is_initialized():
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def launch(arguments: Sequence[str], processes: int) -> None:
    """Start `processes` copies of `python -m recsys.cli ARGUMENTS` on this machine and wait for them.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: one of them failed; all are stopped.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="recsys",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    elastic_launch(config, sys.executable)("-m", "recsys.cli", *arguments)
