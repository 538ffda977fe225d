"""NRMS, and FairRec: a user in two parts, of which the one that knows a sensitive attribute is not served."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field as Limits
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Batch, Component, Dropout, RecipeError, full, full_precision, gather_rows, hookimpl, linear

Share = Annotated[float, Limits(ge=0, lt=1)]
Portion = Annotated[float, Limits(gt=0, lt=1)]
Classes = Annotated[int, Limits(ge=2)]
STEPS, RIDGE = 3, 0.01
"""Of the exact discriminator: Newton's steps on each batch, and the strength of its penalty."""


class NRMS(nn.Module):
    """Self-attention over the events, and additive attention that makes one vector of them.

    h_t = [head_1; head_2; …], head_i = Σ_s softmax_s(q_t^i · k_s^i / √(W / heads)) v_s^i; out = Σ_t softmax_t(a_t)
    h_t, a_t = w · tanh(V h_t + b). Padding is never looked at; an empty history gives zeros. The target is not used: it
    meets the result in the interaction, where the paper has their product.

    Wu et al., "Neural News Recommendation with Multi-Head Self-Attention", EMNLP 2019; its encoder of users.

    Args:
        heads: number of attention heads, each W / heads wide.
        attention: width of the additive attention, V.
        dropout: share of the events' vectors and of the attention's that is dropped in training.
    """

    def __init__(
        self, width: int, *, heads: PositiveInt = 2, attention: PositiveInt = 200, dropout: Share = 0.2
    ) -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"width {width} cannot be split over {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = (linear(width, width, bias=False) for _ in range(3))
        self.inner = linear(width, attention)
        self.outer = linear(attention, 1, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`."""
        place = torch.arange(history.shape[1], device=history.device)
        history = history.masked_fill((place >= length.unsqueeze(1)).unsqueeze(-1), 0.0)
        seen = place < length.clamp(min=1).unsqueeze(1)  # an empty history has one event of zeros, whose result is zero
        events = self.dropout(history)
        q, k, v = (self._split(y) for y in (self.query(events), self.key(events), self.value(events)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).transpose(1, 2).flatten(2)
        mixed = self.dropout(mixed)  # [B, L, W]
        score = full(self.outer(torch.tanh(self.inner(mixed))).squeeze(2)).masked_fill(~seen, -torch.inf)
        pooled = torch.bmm(torch.softmax(score, 1).to(mixed.dtype).unsqueeze(1), mixed).squeeze(1)
        return pooled.masked_fill((length == 0).unsqueeze(1), 0.0)

    def _split(self, y: Tensor) -> Tensor:
        """`[B, L, W] -> [B, heads, L, W / heads]`."""
        return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)


class FairRec(nn.Module):
    """A user as the sum of what knows a sensitive attribute and of what does not, u = u_b + u_d; u_d alone is served.

    Training reads u, scoring u_d, each part an NRMS encoder of its own; of a share `drop` of the rows it reads u_d
    alone, or u_b would learn to do the ranking that is not served. To the loss of the clicks are added, as means over
    the rows: λ_G CE(a | W_b u_b), so that u_b holds what tells the attribute a (context `attribute`); λ_D times
    |cos(u_b, u_d)|, so that they share nothing; and the cross-entropy of a discriminator that tries to tell a from u_d,
    whose gradient reaches u_d times −λ_A, so that it hides what the discriminator finds. Rows of an unknown attribute
    (−1) add nothing to what is about the attribute. The attribute is not an input, and what is served does not compute
    u_b. Use an interaction that is linear in u, such as `fm`: what is served is then a term of what was trained.

    exact: the discriminator is the logistic regression that fits the u_d of the step best (all processes' rows, with a
    ridge of 0.01, three steps of Newton from the last one), so that it cannot lag behind: it leaves u_d
    nothing to gain by changing its code instead of forgetting. gradient: it is a network that learns by the same
    gradient step as all else, as published; the two then tend to go round in circles.

    What is published of the strengths λ is not certain: the defaults are of our recipe for MovieLens. On
    30,000 planted users whose taste has nothing to do with the attribute, λ_G = λ_D = 0.004, λ_A = 0.6 and drop = 0.9
    bring a probe from .82 to .52 and leave the AUC as it is. With a tenth of the users and fewer steps, such strengths
    cost .03 to .08, and λ_G = 0.5 without an adversary .11. Items may still
    carry the attribute into what is recommended; the stage `attribute_probe` measures it, and what u_d tells, with a
    probe that is trained anew.

    Wu et al., "Fairness-aware News Recommendation with Decomposed Adversarial Learning", AAAI 2021, arXiv 2006.16742.

    Args:
        classes: number of classes of the attribute, 0 … classes − 1.
        predict: λ_G.
        orthogonal: λ_D.
        adversarial: λ_A.
        drop: share of the rows that training reads u_d alone of; 0 as published.
        discriminator: exact or gradient.
        hidden: width of each hidden layer of a discriminator that learns by gradient; without any it is linear.
        shares: share of each class among the rows, by whose inverse rows count in both cross-entropies; without, all
            rows count the same.
        heads: of each encoder.
        attention: width of the additive attention of each encoder.
        dropout: of each encoder.

    Raises:
        RecipeError: not as many shares as classes; hidden layers of an exact discriminator.
    """

    def __init__(
        self,
        width: int,
        *,
        classes: Classes = 2,
        predict: NonNegativeFloat = 0.1,
        orthogonal: NonNegativeFloat = 0.1,
        adversarial: NonNegativeFloat = 0.1,
        drop: Share = 0.5,
        discriminator: Literal["exact", "gradient"] = "exact",
        hidden: tuple[PositiveInt, ...] = (),
        shares: tuple[Portion, ...] = (),
        heads: PositiveInt = 2,
        attention: PositiveInt = 200,
        dropout: Share = 0.2,
    ) -> None:
        super().__init__()
        if shares and len(shares) != classes:
            raise RecipeError(f"fairrec: shares has {len(shares)} numbers for {classes} classes")
        if hidden and discriminator == "exact":
            raise RecipeError("fairrec: hidden: only a discriminator that learns by `gradient` has hidden layers")
        self.predict, self.orthogonal, self.adversarial, self.drop = predict, orthogonal, adversarial, drop
        self.free = NRMS(width, heads=heads, attention=attention, dropout=dropout)
        self.aware = NRMS(width, heads=heads, attention=attention, dropout=dropout)
        self.classifier = linear(width, classes)
        exact = discriminator == "exact"
        self.discriminator = Regression(width, classes) if exact else _network(width, hidden, classes)
        weight = [1 / (classes * share) for share in shares] or [1.0] * classes
        self.weight: Tensor
        self.register_buffer("weight", torch.tensor(weight), persistent=False)
        self._parts: tuple[Tensor, Tensor] | None = None
        self._checked = False

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`: u in training, u_d otherwise."""
        free: Tensor = self.free(target, history, length)
        if not self.training:
            return free
        aware: Tensor = self.aware(target, history, length)
        self._parts = (aware, free)
        if self.drop:
            aware = aware * (torch.rand(len(aware), 1, device=aware.device) >= self.drop)
        return aware + free

    def auxiliary(self, batch: Batch) -> Tensor:
        """What is added to the loss of the batch seen last in training, `[]`.

        Raises:
            RecipeError: the data has no context column `attribute`, or more classes of it than `classes`.
        """
        if self._parts is None:
            return self.weight.new_zeros(())
        return torch.stack(tuple(self.terms(batch).values())).sum()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Term → its weighted mean over the rows, `[]`: predict, orthogonal, adversarial."""
        if "attribute" not in batch.context:
            raise RecipeError("fairrec: needs the context column 'attribute'; name it under data.context")
        aware, free = (full(part) for part in cast("tuple[Tensor, Tensor]", self._parts))
        attribute = batch.context["attribute"]
        self._check(attribute)
        weight = batch.context.get("weight", torch.ones_like(attribute)).to(free.dtype)
        if isinstance(self.discriminator, Regression) and self.adversarial:
            known = weight * torch.cat([self.weight, self.weight.new_zeros(1)]).to(free.dtype)[attribute]
            self.discriminator.fit(free.detach(), attribute, known)
        hidden: Tensor = _Reverse.apply(free, self.adversarial)  # type: ignore[no-untyped-call]
        return {
            "predict": self.predict * self._error(self.classifier(aware), attribute, weight),
            "orthogonal": self.orthogonal * (F.cosine_similarity(aware, free).abs() * weight).mean(),
            "adversarial": self._error(self.discriminator(hidden), attribute, weight),
        }

    def _check(self, attribute: Tensor) -> None:
        """Refuse classes that there are no outputs for; where asking makes a device wait, in the first batch alone."""
        if self._checked and attribute.device.type != "cpu":
            return
        self._checked, largest = True, int(attribute.max())
        if largest >= len(self.weight):
            raise RecipeError(
                f"fairrec: the context column 'attribute' has the class {largest}, but classes is {len(self.weight)}; "
                f"set classes to {largest + 1}, or to the number of classes there are"
            )

    def _error(self, logits: Tensor, attribute: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of the rows whose attribute is known, divided by the number of all rows, `[]`."""
        logits = full(logits)
        error = F.cross_entropy(logits, attribute, self.weight.to(logits.dtype), ignore_index=-1, reduction="none")
        return (error * weight).mean()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no batch: tensors that hang on a graph cannot be copied."""
        return {**self.__dict__, "_parts": None}


class Regression(nn.Module):
    """Logistic regression that is solved for the rows at hand, on columns that are centred with them.

    They are not scaled: while u_d is small, the ridge keeps the discriminator weak, and ranking comes first.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.solution: Tensor
        self.mean: Tensor
        self.register_buffer("solution", torch.zeros(width + 1, classes))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, W] -> [B, C]`."""
        with full_precision(x):
            z = x - self.mean.to(x.dtype)
            return z @ self.solution[:-1].to(x.dtype) + self.solution[-1].to(x.dtype)

    @torch.no_grad()
    def fit(self, x: Tensor, attribute: Tensor, weight: Tensor) -> None:
        """Go `STEPS` Newton steps on, on the rows of all processes: `[B, W], [B], [B]`; rows of weight 0 are not used.

        All processes come to the same solution, whatever their number, but for the last bits of the sums.
        """
        x, attribute, weight = (gather_rows(part) for part in (x, attribute, weight))
        with full_precision(x):
            self._solve(x, attribute, weight)

    def _solve(self, x: Tensor, attribute: Tensor, weight: Tensor) -> None:
        share = weight / weight.sum().clamp(min=1e-12)
        mean = share @ x
        x = torch.cat([x - mean, torch.ones_like(x[:, :1])], 1)  # [B, W + 1]
        wanted = F.one_hot(attribute.clamp(min=0), self.solution.shape[1]).to(x.dtype)  # [B, C]
        solution = self.solution.to(x.dtype)
        size = solution.numel()
        for _ in range(STEPS):
            p = torch.softmax(x @ solution, 1)
            slope = x.T @ ((p - wanted) * share[:, None]) + RIDGE * solution  # [W + 1, C]
            spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # [B, C, C]
            curve = torch.einsum("b,bi,bj,bcd->icjd", share, x, x, spread).reshape(size, size)
            curve = curve + RIDGE * torch.eye(size, dtype=x.dtype, device=x.device)
            solution = solution - torch.linalg.solve(curve, slope.flatten()).view_as(solution)
        self.solution.copy_(solution)
        self.mean.copy_(mean)


def _network(width: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """A discriminator that learns by gradient."""
    widths = (width, *hidden)
    layers = [part for a, b in itertools.pairwise(widths) for part in (linear(a, b), nn.ReLU())]
    # Scaled, or u_d would escape by growing: the loss of a discriminator that errs has no bound.
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), *layers, linear(widths[-1], classes))


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is turned round and scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


@hookimpl
def recsys_components() -> list[Component]:
    """Return the sequence encoders."""
    return [Component("sequence", "nrms", NRMS), Component("sequence", "fairrec", FairRec)]
