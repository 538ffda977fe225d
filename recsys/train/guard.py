"""The guard of training: a step whose loss or gradient is not finite never reaches the weights.

The decision is made where the tensors are. Every step leaves a flag on the device that masks the update; the host
reads the flags later (on a GPU, every `READ_EVERY` steps from a copy that was asked for that much earlier), so that
it never waits for a step. A bad step is skipped while the budget lasts; the bad step after that masks itself and all
that follow, so that the weights stay as they were before it until the host has learned of it and stops.

A skipped step changes neither weights, buffers nor the optimizer's state, and its loss is left out of the epoch's
mean. It still counts as a step: the order of rows, the selector's schedule and the random numbers (dropout) go on as
if it had been taken, because on a GPU these are the host's, which does not know of the skip yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

READ_EVERY = 32
"""Steps between two readings of a GPU's flags; on a CPU reading costs nothing, and every step is read."""

SMALL = 1 << 16
"""Elements of a buffer that is always copied: PyTorch's batch norm writes its statistics without counting a version."""

Place = tuple[int, str]
"""Number of a module, and name of one of its buffers."""


@dataclass(frozen=True)
class RandomState:
    """The states of torch's random numbers before a step, so that it can be repeated."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Read the states; both are kept by the host, so no GPU is waited for."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class Buffers:
    """Puts a module's buffers, such as the statistics of batch norm, back to what they were before a step.

    Small floating-point buffers are copied in every step; of the others (index tables, or tables of constants, which
    may be large) only those that have changed, as the version counters of the tensors tell.

    Args:
        module: whose buffers these are.
    """

    def __init__(self, module: nn.Module) -> None:
        # The dictionaries themselves, so that a buffer that a step replaces or adds is seen without a walk.
        self._of_modules = [part._buffers for part in module.modules()]
        self._seen: dict[Place, tuple[Tensor, int]] = {}
        self._saved: dict[Place, Tensor] = {}

    def remember(self) -> None:
        """Keep the values before a step."""
        for place, buffer in self._changed():
            saved = self._saved.get(place)
            if saved is None or saved.shape != buffer.shape or saved.device != buffer.device:
                self._saved[place] = buffer.clone()
            else:
                saved.copy_(buffer)
            self._seen[place] = (buffer, buffer._version)

    def restore_where(self, masked: Tensor) -> None:
        """Give the values from before the step back if `masked`, a bool `[]`, is set."""
        for place, buffer in self._changed():
            if place in self._saved:
                buffer.copy_(torch.where(masked, self._saved[place], buffer))

    def _changed(self) -> Iterator[tuple[Place, Tensor]]:
        for i, buffers in enumerate(self._of_modules):
            for name, buffer in buffers.items():
                if buffer is None:
                    continue
                seen = self._seen.get((i, name))
                same = seen is not None and seen[0] is buffer and seen[1] == buffer._version
                if not same or (buffer.is_floating_point() and buffer.numel() <= SMALL):
                    yield (i, name), buffer


class StepGuard:
    """Decides of every optimizer step whether it may change the model; all ranks decide alike.

    Args:
        device: of the model.
        allowed: steps of the stage that may be skipped; the bad step after them stops.
        on_skip: called with the number of a skipped step, from 0 in the stage, when the host learns of it.
        on_stop: called with the number of the bad step that stops and the random state before it; must raise.
        skipped: steps that were skipped before the stage was resumed; the list grows as the host learns of more.
        read_every: steps between two readings of the flags; by default 1 on a CPU and `READ_EVERY` elsewhere.

    Attributes:
        masked: float32 `[]`, 1 where the current step must not change anything: the `found_inf` of PyTorch's
            fused optimizers, which then leave weights, moments and step counts alone without asking the host.
    """

    def __init__(
        self,
        device: torch.device,
        allowed: int,
        on_skip: Callable[[int], None],
        on_stop: Callable[[int, RandomState], NoReturn],
        skipped: list[int] | None = None,
        read_every: int | None = None,
    ) -> None:
        self.masked = torch.zeros((), device=device)
        self.skipped = [] if skipped is None else skipped
        self._device = device
        self._allowed = max(allowed, len(self.skipped))
        self._on_skip, self._on_stop = on_skip, on_stop
        self._every = read_every or (1 if device.type == "cpu" else READ_EVERY)
        # [count of bad steps, their numbers …, the number of the step in hand]: one tensor, so one copy to read.
        empty = [-1] * (self._allowed + 2 - len(self.skipped))
        self._state = torch.tensor([len(self.skipped), *self.skipped, *empty], dtype=torch.int64, device=device)
        self._count, self._first, self._numbers = self._state[:1], self._state[0], self._state[1:]
        self._reading: _Reading | None = None
        self._random: deque[tuple[int, RandomState]] = deque(maxlen=2 * self._every + 1)

    def begin(self, step: int) -> None:
        """Note the random state before step `step` of the stage."""
        self._random.append((step, RandomState.now(self._device)))

    def judge(self, step: int, norm: Tensor, loss: Tensor) -> Tensor:
        """Set `masked` for the step, the same on every rank, without waiting for the device.

        Args:
            step: number of the step in the stage, from 0.
            norm: `[]`, norm of the whole gradient, before clipping; one that overflows counts as not finite.
            loss: `[]`, any sum that is finite only if all losses of the step are.

        Returns:
            bool `[]`, the same as `masked`.
        """
        bad = (norm + loss) * 0 != 0  # few small operations: they are most of the cost of the guard
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Gradients are averaged over the ranks already, but each has its own loss.
            flag = bad.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            bad = flag.bool()
        # Written in any case, and kept where the count moves on; the last place is for steps after the stop.
        self._numbers.index_fill_(0, self._count.clamp(max=self._allowed + 1), step)
        self._count.add_(bad)
        masked = (self._first > self._allowed).logical_or_(bad)
        self.masked.copy_(masked)
        return masked

    def look(self, step: int) -> None:
        """Learn of skipped steps after `judge` of step `step`: at once on a CPU, else of those some steps ago.

        When that is depends on `step` only, so that ranks learn of a stop in the same step.

        Raises:
            RecsysError: from `on_stop`.
        """
        if self._every == 1:
            if bool(self.masked):
                self.settle()
        elif step % self._every == 0:
            earlier, self._reading = self._reading, _Reading(self._state)
            if earlier is not None:
                self._take(earlier.values())

    def settle(self) -> None:
        """Learn of all steps so far; this waits for the device.

        Raises:
            RecsysError: from `on_stop`.
        """
        self._reading = None
        self._take(self._state.tolist())

    def _take(self, state: Sequence[int]) -> None:
        count, numbers = state[0], state[1:]
        for step in numbers[len(self.skipped) : min(count, self._allowed)]:
            self.skipped.append(step)
            self._on_skip(step)
        if count > self._allowed:
            step = numbers[self._allowed]
            self._on_stop(step, next(random for number, random in self._random if number == step))


class _Reading:
    """A copy of the flags on its way from the device to the host."""

    def __init__(self, state: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if state.device.type == "cuda":
            self._values = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
            self._values.copy_(state, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._values = state.clone()

    def values(self) -> list[int]:
        """Return the numbers; asked for so long after the copy, this does not wait."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
