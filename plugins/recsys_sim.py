"""SIM, the search-based interest model: look for the events that matter to the target, then look at those closely."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Batch, Component, MLPBlock, RecipeError, full_precision, hookimpl, label_bce, linear


class Search(nn.Module):
    """The general search unit: which events are near the target, learned from the labels.

    r_t = (W_b k_t) · (W_a q); in training the logit of a perceptron on [Σ_t r_t k_t; q] teaches W_a and W_b. Both
    start as one matrix: to the perceptron −r_t is as good as r_t, and so those events score high that are near.
    """

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.of_target, self.of_event = (linear(width, width, bias=False) for _ in range(2))  # W_a, W_b
        with torch.no_grad():
            self.of_event.weight.copy_(self.of_target.weight)
        self.judge = MLPBlock(2 * width, hidden)
        self.last = linear(self.judge.width, 1)

    def forward(self, target: Tensor, events: Tensor) -> Tensor:
        """`[B, W], [B, L, W] -> [B, L]`, at least float32: half precision would take other events than it serves."""
        with full_precision(events):
            events = events if events.dtype == torch.float64 else events.float()
            wanted = self.of_target(target.to(events.dtype)) @ self.of_event.weight  # W_bᵀ W_a q: nothing of size L
            return torch.bmm(events, wanted.unsqueeze(2)).squeeze(2)

    def logit(self, target: Tensor, events: Tensor, scores: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B, L] -> [B]`; events are zero in the padding."""
        found = torch.bmm(scores.unsqueeze(1).to(events.dtype), events).squeeze(1)  # [B, W]
        logit: Tensor = self.last(self.judge(torch.cat([found, target], 1))).squeeze(1)
        return logit


class SIM(nn.Module):
    """Search-based interest: the events that a learned search finds for the target, under multi-head attention.

    The general search unit scores every event, r_t = (W_b k_t) · (W_a q). The exact one looks at the `top` highest,
    head_i = Σ_t softmax_t((U_i k_t) · (V_i q) / √(W / heads)) k_t, out = W_o [head_1; head_2; …]. Which events are
    taken has no gradient: the search learns from the labels, by the cross-entropy of a perceptron on [Σ_t r_t k_t; q]
    over all events, which is added to the loss. Padding is never taken; an empty history gives zeros.

    This is the paper's soft search. Its losses weigh α and β; here β is 1, and what counts is α / β. The encoder sees
    no times, so there are no embeddings of them, and the unit for the newest events is another encoder's: give it a
    history of its own. W_o, which brings the heads back to W, is the first layer of the paper's perceptron above.

    Qi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
    Prediction", CIKM 2020, arXiv 2006.05639.

    Args:
        top: number of events that the search finds.
        heads: number of attention heads; their scores are products of W / heads numbers.
        auxiliary: weight of the search's own loss.
        auxiliary_hidden: width of each hidden layer of its perceptron.
    """

    def __init__(
        self,
        width: int,
        *,
        top: PositiveInt = 50,
        heads: PositiveInt = 2,
        auxiliary: PositiveFloat = 1.0,
        auxiliary_hidden: tuple[PositiveInt, ...] = (80, 40),
    ) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"width {width} cannot be split over {heads} heads")
        self.width, self.top, self.heads, self.strength = width, top, heads, auxiliary
        self.search = Search(width, auxiliary_hidden)
        self.query, self.key = (linear(width, width, bias=False) for _ in range(2))  # V, U, head below head
        self.out = linear(heads * width, width, bias=False)
        self._logit: Tensor | None = None

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        valid = torch.arange(history.shape[1], device=history.device) < length.unsqueeze(1)  # [B, L]
        history = history.masked_fill(~valid.unsqueeze(-1), 0.0)
        traced = torch.compiler.is_compiling()  # a graph must not depend on L
        everything = not traced and history.shape[1] <= self.top
        if not traced:
            self._logit = None
        if self.training or not everything:
            scores = self.search(target, history)
            if self.training and not traced:
                self._logit = self.search.logit(target, history, scores)
            if not everything:
                history, valid = self.found(scores.detach(), history, valid)
        heads = torch.bmm(self.weights(target, history, valid), history)  # [B, heads, W]
        pooled: Tensor = self.out(heads.flatten(1))
        return pooled

    def found(self, scores: Tensor, history: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The events of the highest scores and which of them are events: `[B, L], … -> [B, top, W], [B, top] bool`."""
        scores = scores.masked_fill(~valid, -torch.inf)
        if torch.compiler.is_compiling():  # where L may be less than `top`, without a look at L
            scores = F.pad(scores, (0, self.top), value=-torch.inf)
        index = scores.topk(self.top, 1).indices
        index = index.clamp(max=history.shape[1] - 1).unsqueeze(2).expand(-1, -1, self.width)
        taken = torch.arange(self.top, device=valid.device) < valid.sum(1, keepdim=True)  # padding has the last ranks
        return history.gather(1, index), taken

    def weights(self, target: Tensor, events: Tensor, valid: Tensor) -> Tensor:
        """What each head looks at, `[B, W], [B, L, W], [B, L] bool -> [B, heads, L]`; zero where no event is."""
        size = self.width // self.heads
        query = self.query(target).view(-1, self.heads, size).transpose(0, 1)  # [heads, B, W / heads]
        # U_iᵀ V_i q for each head: the events are read as they are, and not projected.
        asked = torch.bmm(query, self.key.weight.view(self.heads, size, -1)).transpose(0, 1)  # [B, heads, W]
        score = torch.bmm(asked, events.transpose(1, 2)) * size**-0.5
        valid = valid.unsqueeze(1)
        shares = torch.softmax(score.masked_fill(~valid, torch.finfo(score.dtype).min), 2)
        return shares.masked_fill(~valid, 0.0)

    def auxiliary(self, batch: Batch) -> Tensor:
        """Return the weighted loss of the search on the batch seen last in training, `[]`."""
        if self._logit is None:
            return self.out.weight.new_zeros(())
        return self.strength * label_bce(self._logit, batch)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no batch: tensors that hang on a graph cannot be copied."""
        return {**self.__dict__, "_logit": None}


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoder."""
    return [Component("sequence", "sim", SIM)]
