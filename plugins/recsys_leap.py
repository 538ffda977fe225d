"""LeAP: gates that mix every field with a copy of itself shuffled over the batch; useless fields do not mind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from recsys.api import Component, Fields, Run, Selection, hookimpl, measure, predict

Weigh = Literal["l2", "l1", "l2sq", "uniform"]
"""How a gate's divergence is measured; uniform: every gate costs the same."""
Copies = Literal["shift", "independent"]
Share = Annotated[float, pydantic.Field(gt=0, le=1)]

SLOPE = 5.0
"""g = σ(SLOPE · θ)."""
MEMORY = 0.98
"""Of the moving average of the divergence."""
POLARISED = 0.8
"""Mean 2|g − ½| above which the gates have decided by themselves."""
THRESHOLDS = (0.3, 0.5, 0.7)
"""`gates.json` counts the gates above each of these: equal counts mean that what is kept does not hang on ½."""
BETAS, EPS = (0.9, 0.999), 1e-8
WHOLE = {4: torch.float32, 8: torch.float64, 16: torch.complex128}
"""A narrow block of so many bytes is moved as one number of that type: several times as fast as number by number."""


@dataclass(frozen=True)
class Variant:
    """What a preset stands for."""

    weigh: Weigh
    strength: float
    warmup: float
    copies: Copies
    by_gate: bool


VARIANTS = {
    "reconstruction": Variant("l2", 0.2, 0.5, "shift", by_gate=False),
    "open": Variant("l2", 0.2, 0.1, "shift", by_gate=True),
    "official": Variant("uniform", 0.1, 0.0, "independent", by_gate=True),
}


class LeAP(nn.Module):
    """Gates between a field's vectors and the same vectors shuffled over the batch, with a price for open gates.

    x'_bf = g_f x_bf + (1 − g_f) sg(x_{π_f(b) f}), g = σ(5θ), π_f another permutation for every field in every step.
    What a field loses by this is what a permutation test would say of it, found for all fields in one training run; a
    weight behind the gate cannot make up for it, as it can for a factor. Gates pay λ · mean_f w_f g_f.

    Published (the abstract, and the public code, which is the same as ShuffleGate's, arXiv 2503.09315): the mixing, the
    gates, θ = 1 at first, w = 1, one step of the weights on a training batch and one of the gates on a validation batch
    in turn, and training again from scratch on the half of the fields with the largest gates. With `rate: 1e-3` of the
    stage `bilevel_fit`, `preset: official` does that; but evaluation never shuffles here, as the code does.
    Published in words alone: that a "permutation divergence" sets w, so that narrow and sparse fields are not dropped,
    and wide ones not spared, for their shape. Our reconstruction: D_f = mean_b ‖x_bf − x_{π_f(b) f}‖, averaged over
    steps; w_f = max(D_f / mean_k D_k, `floor`), means over what varies; the floor, λ, the warm-up, the step size,
    scores, what is kept. The authors' formula and tables are not public: nothing here is claimed to equal them.

    Scores, our reconstruction too: in the warm-up every gate is ½, nothing is paid, and
    s_f = Σ_t t² b_tf / Σ_t t² is taken, b_tf = −∂L/∂g_f in step t; late steps, of a network that has learned, count
    most. At ½ a field and its copy can be exchanged, so E b = 0 for a field that tells nothing, whatever the network;
    elsewhere a gate also answers to how much it spreads x', and the values that gates end with, near 0 and near 1, say
    little of order. Then the gates open, and pay. The score is v / (1 + 2|v|), within ½ of 0, with v = s_f for a field
    whose gate ends below ½; above, it is one more, with v = s_f (2 g_f − 1), for s_f counts twice what two fields tell
    alike, while the price, with all others there, closes their gates further. Scores are gates alone with the other
    presets, whose warm-up holds gates open, without a warm-up, and with `per: dim`, where the other dimensions of a row
    give one away.

    Kept is what has g > ½ once the gates are polarised, mean 2|g − ½| > 0.8; until then, and always with the official
    preset, the `share` with the largest scores. Evaluation sees what is kept, and zeros elsewhere. The gates learn in
    the stage `bilevel_fit`, or with `one_level` in a fit stage; either runs all of its `epochs` and keeps the last, for
    the loss alone, without the price, would choose an early one. Every stage that moves gates writes `gates.json`: the
    gates, s_f as the benefit, how polarised they are, how many are above .3, .5 and .7, D_f ≈ r_f √d_f s (share of
    pairs that differ, width, spread of a coordinate), and what the validation split says with shuffled copies in the
    place of all that is not kept.

    Only scalar fields pass the gates: pooled histories, their targets and first-order weights do not. A field of fewer
    dimensions comes with zeros in the others. With some forty fields a permutation test costs less than this search;
    its case is hundreds.

    "LeAP: Learnable Adaptive Permutation", arXiv 2606.01111; ShuffleGate, arXiv 2503.09315.

    Args:
        preset: reconstruction: divergence l2, λ 0.2, warm-up 0.5, shifted copies. open: the same with warm-up 0.1, in
            which gates are open, and gates for scores. official: uniform, λ 0.1 (its value for MovieLens 1M; Avazu
            0.005, Criteo 0.02), no warm-up, independent copies, always the `share` with the largest gates.
        weigh: l2, l1 or l2sq (squared): the norm in the divergence. uniform: w = 1. null: as the preset has it.
        strength: λ. null: as the preset has it.
        floor: least w; without it sparse noise has no reason to close its gate.
        per: field: a gate for each field. dim: for each dimension of each field, shuffled on its own.
        one_level: step size of gates that learn from training rows in a fit stage: one pass instead of two, but ids
            that are learned by heart look useful. null: they wait for `bilevel_fit` and its `rate`.
        warmup: share of the stage in which the gates are held and measured, before they move. null: as the preset has
            it.
        share: of the gates that are kept where they have not decided by themselves.
        copies: shift: one permutation of the batch, in which every field is shifted by a number of its own; no row
            meets itself. independent: a permutation for each field. null: as the preset has it.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        preset: Literal["reconstruction", "open", "official"] = "reconstruction",
        weigh: Weigh | None = None,
        strength: NonNegativeFloat | None = None,
        floor: NonNegativeFloat = 0.1,
        per: Literal["field", "dim"] = "field",
        one_level: PositiveFloat | None = None,
        warmup: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None,
        share: Share = 0.5,
        copies: Copies | None = None,
    ) -> None:
        super().__init__()
        variant = VARIANTS[preset]
        self.fields, self.floor, self.one_level, self.share = fields, floor, one_level, share
        self.weigh = weigh or variant.weigh
        self.strength = variant.strength if strength is None else strength
        self.warmup = variant.warmup if warmup is None else warmup
        self.copies, self.by_gate = copies or variant.copies, variant.by_gate or per == "dim"
        self.official = preset == "official"
        self.shape = (len(fields), 1) if per == "field" else (len(fields), fields.dim)
        self.theta = nn.Parameter(torch.ones(self.shape))
        self.progress: Tensor
        self.divergence: Tensor
        self.changed: Tensor
        self.seen: Tensor
        self.first: Tensor
        self.second: Tensor
        self.steps: Tensor
        self.benefit: Tensor
        self.measured: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("divergence", torch.zeros(self.shape))
        self.register_buffer("changed", torch.zeros(self.shape))  # r, the share of pairs that differ
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first", torch.zeros(self.shape))  # Adam's moments of θ
        self.register_buffer("second", torch.zeros(self.shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("benefit", torch.zeros(self.shape))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))
        self.estimates = False
        self.steps_before = 0

    def gates(self) -> Tensor:
        """`[F, 1]`, or `[F, D]`."""
        return torch.sigmoid(SLOPE * self.theta)

    def _mixing(self) -> Tensor:
        """The gates that a batch passes: while they are measured, ½, with the slope that θ has there."""
        if self.by_gate:
            return self.gates()
        return torch.sigmoid(SLOPE * torch.where(self._held(), self.theta - self.theta.detach(), self.theta))

    def _held(self) -> Tensor:
        """Whether gates are measured, because none has moved yet, `[]`."""
        return (self.progress < self.warmup) & (self.steps == 0)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        if not self.training and not self.estimates:
            return torch.where(self.kept_gates(), e, 0.0)
        x = e.reshape(len(e), self.theta.numel(), -1)  # [B, F, D], or [B, F·D, 1]
        copy = self.shuffled(x.detach())
        if self.estimates:
            return torch.where(self.kept_gates().view(-1, 1), x, copy).view_as(e)
        self._observe(x.detach() - copy)
        # Row by row, with as many gates as numbers: a loop over few numbers of each of many blocks would be slow.
        gates = self._mixing().to(x.dtype).view(-1, 1).expand(x.shape[1:]).flatten()
        return torch.lerp(copy.flatten(1), x.flatten(1), gates).view_as(e)

    def shuffled(self, x: Tensor) -> Tensor:
        """Every block of columns in an order of rows of its own, `[B, G, W] -> [B, G, W]`."""
        return shifted(x) if self.copies == "shift" else permuted(x)

    @torch.no_grad()
    def _observe(self, difference: Tensor) -> None:
        """Take a batch's `x − copy [B, G, W]` into the moving averages."""
        size = torch.linalg.vector_norm(difference, ord=1 if self.weigh == "l1" else 2, dim=2)  # [B, G]
        # The mean over rows as a product: with a thousand blocks, other ways take several times as long.
        each = size.new_full((len(size),), 1 / len(size))
        changed = (each @ size.sign()).view(self.shape).to(self.changed.dtype)
        now = (each @ (size.square() if self.weigh == "l2sq" else size)).view(self.shape).to(self.divergence.dtype)
        fresh = 1 - MEMORY * (self.seen > 0).to(self.divergence.dtype)
        self.divergence.lerp_(now, fresh)
        self.changed.lerp_(changed, fresh)
        self.seen.add_(1)

    def weights(self) -> Tensor:
        """The price of each gate, w `[F, 1]` or `[F, D]`; one on average, before the floor."""
        if self.weigh == "uniform":
            return torch.ones_like(self.divergence)
        mean = self.divergence.sum() / self._varying()
        relative = torch.where(mean > 0, self.divergence / mean.clamp(min=torch.finfo(mean.dtype).tiny), 1.0)
        return relative.clamp(min=self.floor)

    def _varying(self) -> Tensor:
        """How many gates have something to mix, `[]`: columns of zeros, or of any constant, do not count."""
        count = (self.divergence > 0).sum()
        return torch.where(count > 0, count, self.theta.numel())

    def penalty(self) -> Tensor:
        """λ · mean w g, `[]`; nothing during the warm-up."""
        paid = self._moves() * (self.weights() * self.gates()).sum()
        return self.strength * paid / (self.theta.numel() if self.weigh == "uniform" else self._varying())

    def anneal(self, progress: float) -> None:
        """Note how far the stage is, for the warm-up."""
        self.progress.fill_(progress)

    def _moves(self) -> Tensor:
        """1 once the warm-up is over, else 0, `[]`; reading it would wait for the device in every step."""
        return (self.progress >= self.warmup).to(self.theta.dtype)

    def architecture(self) -> tuple[nn.Parameter, ...]:
        """θ, unless it learns in a fit stage."""
        return () if self.one_level else (self.theta,)

    def search_step(self, rate: float) -> None:
        """Move θ by Adam, without decay, once the warm-up is over."""
        if self.theta.grad is not None:
            self._move(self.theta.grad, rate)

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """θ, if it learns in a fit stage."""
        return (self.theta,) if self.one_level else ()

    def after_step(self) -> None:
        """Move θ in a fit stage."""
        if self.one_level and self.theta.grad is not None:
            self._move(self.theta.grad, self.one_level)

    @torch.no_grad()
    def _move(self, g: Tensor, rate: float) -> None:
        moves = self._moves()
        self._measure(g, self._held().to(g.dtype))
        self.steps.add_(moves.long())
        self.first.lerp_(g, moves * (1 - BETAS[0]))
        self.second.lerp_(g.square(), moves * (1 - BETAS[1]))
        count = self.steps.clamp(min=1).to(g.dtype)
        mean, square = self.first / (1 - BETAS[0] ** count), self.second / (1 - BETAS[1] ** count)
        self.theta.sub_(moves * rate * mean / (square.sqrt() + EPS))

    def _measure(self, g: Tensor, held: Tensor) -> None:
        """Take ∂L/∂θ `[F, 1]` into the mean benefit, in a step in which all gates are `held` at ½."""
        if self.by_gate:
            return
        self.measured.add_(held.long())
        count = self.measured.clamp(min=1).to(g.dtype)
        share = 6 * count / ((count + 1) * (2 * count + 1))  # of t² in 1 + 4 + … + t²
        self.benefit.lerp_(-4 / SLOPE * g, held * share)

    def reached(self) -> bool | None:
        """None before the gates are measured or move, then False: a stage that does so keeps its last epoch."""
        return None if self.done() == 0 else False

    def done(self) -> int:
        """Steps in which the gates were measured or moved."""
        return int(self.steps + self.measured)

    def worth(self) -> Tensor:
        """What ranks the gates, `[F, 1]` or `[F, D]`: the benefit, open ones first, where it was measured."""
        gates = self.gates().detach()
        value = torch.where(gates > 0.5, self.benefit * (2 * gates - 1), self.benefit)
        measured = (self.measured > 0) & (not self.by_gate)
        return torch.where(measured, (gates > 0.5) + value / (1 + 2 * value.abs()), gates)

    def polarisation(self) -> Tensor:
        """Mean 2|g − ½|, `[]`."""
        return (2 * self.gates().detach() - 1).abs().mean()

    def kept_gates(self) -> Tensor:
        """`[F, 1]`, or `[F, D]`, bool; never nothing."""
        theta, worth = self.theta.detach(), self.worth()
        best = worth.flatten().sort(descending=True).values
        top = worth >= best[max(round(self.share * len(best)), 1) - 1]  # with ties, such as all of them at first
        if self.official:
            return top
        return torch.where(self.polarisation() > POLARISED, (theta > 0) | (theta >= theta.max()), top)

    def kept(self) -> Selection:
        """The fields, and the dimensions where they have gates of their own."""
        kept = self.kept_gates().cpu()
        names = tuple(name for name, row in zip(self.fields.names, kept.any(1).tolist(), strict=True) if row)
        by_dim = kept.shape[1] > 1
        return Selection(names, dims=dict(zip(self.fields.names, kept.clone(), strict=True)) if by_dim else {})

    def scores(self) -> Mapping[str, Tensor]:
        """What ranks each field, `[]`; where every dimension has a gate, their mean."""
        found = self._field_gates() if self.shape[1] > 1 else self.worth().squeeze(1)
        return dict(zip(self.fields.names, found, strict=True))

    def _field_gates(self) -> Tensor:
        """The gate of each field, the mean of those that mix something where every dimension has one, `[F]`."""
        g = self.gates().detach()
        varies = self.divergence > 0
        varies = varies | ~varies.any(1, keepdim=True)
        return (g * varies).sum(1) / varies.sum(1)

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """For evaluation: shuffled copies in the place of all that is not kept, instead of zeros."""
        self.estimates = True
        try:
            yield
        finally:
            self.estimates = False

    def report(self, e: Tensor) -> dict[str, Any]:
        """What the search has found, for JSON.

        Args:
            e: vectors of some rows, `[B, F, D]`, to see how wide each field is.
        """
        width = (e != 0).any(0).sum(1)
        kept, w, changed = self.kept_gates(), self.weights(), self.changed.amax(1)
        additive = self.weigh in ("l1", "l2sq")
        norm = self.divergence.sum(1) if additive else torch.linalg.vector_norm(self.divergence, dim=1)
        table: dict[str, dict[str, Any]] = {}
        gates = self._field_gates()
        for i, name in enumerate(self.fields.names):
            scale = float(changed[i]) * float(width[i]) ** (1.0 if additive else 0.5)
            table[name] = {
                "gate": float(gates[i]),
                "benefit": float(self.benefit[i].sum()),
                "kept": bool(kept[i].any()),
                "divergence": float(norm[i]),
                "price": float(w[i].mean()),
                "changed": float(changed[i]),
                "width": int(width[i]),
                "spread": float(norm[i]) / scale if scale else 0.0,
            }
            if self.shape[1] > 1:
                table[name]["gates"] = self.gates()[i].tolist()
        polarisation = float(self.polarisation())
        rule = "share" if self.official or polarisation <= POLARISED else "gates above one half"
        steps = {"steps": int(self.steps), "steps_held": int(self.measured)}
        above = {str(least): int((self.gates() > least).sum()) for least in THRESHOLDS}
        return {"polarisation": polarisation, "kept_by": rule, "gates_above": above, **steps, "fields": table}


def shifted(x: Tensor) -> Tensor:
    """Along one random circle of the rows, block g from g + 1 rows further on, `[B, G, W] -> [B, G, W]`.

    No row is its own source, and no two blocks have the same source for a row as long as G < B. For one row, any
    sources are as likely as any others, since the circle is random. Rows are moved whole, twice; the shift between is a
    view of the rows with another stride, so that many narrow blocks cost what a few wide ones do.
    """
    dtype, shape, kind = x.dtype, x.shape, WHOLE.get(x.shape[2] * x.element_size())
    x = x.contiguous() if kind is None else x.contiguous().view(kind)
    rows, blocks, width = x.shape
    circle = torch.randperm(rows, device=x.device)
    place = torch.empty_like(circle)
    place[circle] = torch.arange(rows, device=x.device)
    if blocks >= rows:  # more blocks than distances
        distance = 1 + torch.arange(blocks, device=x.device) % max(rows - 1, 1)
        moved = taken(x, circle[(place.unsqueeze(1) + distance) % rows])
    else:
        row = blocks * width + 1  # one more than a row has: rows a power of two apart would share a few cache lines
        along = x.new_empty(rows + blocks, row)  # [B + G, G·W + 1]
        torch.index_select(x.flatten(1), 0, torch.cat([circle, circle[:blocks]]), out=along[:, :-1])
        moved = along.as_strided((rows, blocks, width), (row, row + width, 1), row).contiguous().index_select(0, place)
    return moved if kind is None else moved.view(dtype).view(shape)


def permuted(x: Tensor) -> Tensor:
    """By a permutation for each block, drawn one by one, much faster than by sorting, `[B, G, W] -> [B, G, W]`."""
    rows, blocks, _ = x.shape
    return taken(x, torch.stack([torch.randperm(rows, device=x.device) for _ in range(blocks)], 1))


def taken(x: Tensor, order: Tensor) -> Tensor:
    """Each block from the rows of its own, `[B, G, W], [B, G] -> [B, G, W]`."""
    blocks = x.shape[1]
    place = order * blocks + torch.arange(blocks, device=x.device)
    return x.flatten(0, 1).index_select(0, place.flatten()).view_as(x)


@hookimpl
def recsys_before_stage(run: Run, stage: str) -> None:
    """Remember where the gates are."""
    if isinstance(run.model.selector, LeAP):
        run.model.selector.steps_before = run.model.selector.done()


@hookimpl
def recsys_after_stage(run: Run, stage: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Tell what a stage that moved the gates has found."""
    selector = run.model.selector
    if not isinstance(selector, LeAP) or selector.done() == selector.steps_before:
        return
    told = selector.report(_vectors(run))
    if "valid" in run.splits:
        with selector.estimating():
            found = predict(run.model, run.split("valid"), run.train.eval_batch_size, run.world, run.device)
        told["without_the_rest"] = measure(found, {name: run.metric(name) for name in ("auc", "logloss")})
    if run.world.leads:
        text = json.dumps(told, indent=1)
        (run.stage_folder / "gates.json").write_text(text + "\n", encoding="utf-8")
    kept = [name for name, found in told["fields"].items() if found["kept"]]
    run.say(
        f"{stage}: leap keeps {len(kept)} of {len(told['fields'])} fields ({', '.join(kept)}) by {told['kept_by']}; "
        f"polarisation {told['polarisation']:.3f}"
    )


@torch.no_grad()
def _vectors(run: Run) -> Tensor:
    """Some training rows as the selector sees them, `[B, F, D]`."""
    shards = run.split("train")
    batch = shards.read(0, min(len(shards), run.train.batch_size)).to(run.device)
    vectors: Tensor = run.model.embedding(batch.ids, batch.values)
    return vectors


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selector, with its stages."""
    stages = (
        {"use": "bilevel_fit"},
        {"use": "reset"},
        {"use": "prune"},
        {"use": "fit", "name": "retrain"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("selector", "leap", LeAP, stages)]
