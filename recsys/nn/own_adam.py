"""The optimizer of a part that moves parameters itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

BETAS, EPS = (0.9, 0.999), 1e-8


class OwnAdam(nn.Module):
    """Adam without decay, for parameters that a part moves itself, in `search_step` or `after_step`.

    Its moments are state of the part, so that a run that was stopped goes on to the same bits, but no buffers that a
    model is said to hold. A step of zero gradients alone, such as one that is skipped, changes nothing.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv 1412.6980.

    Args:
        parameters: what is moved; they stay the part's own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._sizes = [p.numel() for p in parameters]
        self.mean: Tensor
        self.square: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.zeros(sum(self._sizes)), persistent=False)
        self.register_buffer("square", torch.zeros(sum(self._sizes)), persistent=False)
        self.register_buffer("steps", torch.zeros(len(self._sizes)), persistent=False)

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        """Move the parameters by their `.grad`; those without one stay.

        Args:
            parameters: those that it was built with, in the same order.
            rate: step size.
        """
        each = (torch.split(self.mean, self._sizes), torch.split(self.square, self._sizes), self.steps.unbind())
        moments = zip(*each, strict=True)
        moved = [(p, p.grad, *m) for p, m in zip(parameters, moments, strict=True) if p.grad is not None]
        if not moved:
            return
        own, grads, means, squares, steps = (list(column) for column in zip(*moved, strict=True))
        nothing = torch.stack([g.count_nonzero() for g in grads]).sum() == 0
        adam(
            own,
            grads,
            [m.view_as(p) for m, p in zip(means, own, strict=True)],
            [s.view_as(p) for s, p in zip(squares, own, strict=True)],
            [],
            steps,
            fused=True,
            found_inf=nothing.float(),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def taken(self) -> int:
        """Steps that changed something; asks the device."""
        return int(self.steps.max())

    def get_extra_state(self) -> Tensor:
        """The moments and the counts of steps, `[2 N + P]`."""
        return torch.cat([self.mean, self.square, self.steps])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from such a state."""
        count = sum(self._sizes)
        self.mean.copy_(state[:count])
        self.square.copy_(state[count : 2 * count])
        self.steps.copy_(state[2 * count :])
