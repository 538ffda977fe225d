"""MGQE: a vector is put together of centroids, of which frequent values may choose among more than rare ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import (
    Column,
    Component,
    EncodedSchema,
    Fields,
    Guard,
    Keep,
    Layout,
    Rank,
    RecipeError,
    Selection,
    Table,
    column_groups,
    hookimpl,
    kept_columns,
    places,
    scale,
    widen,
)

RATE = 0.1
"""Share of the way to the mean of its vectors that a centroid goes in a step."""
WINDOW = 100
"""Steps after which a centroid that no vector had is put elsewhere."""
_AT_ONCE = 1 << 18
"""Distances computed at once: as many as the cache of a CPU holds."""
_MANY = 1 << 26
"""The same for a GPU, which works best on many."""


class MGQE(Table):
    """A table that learns as the nearest of a few centroids, part by part of its vectors.

    e_p = c_{p,k}, k = argmin_{k < K_i} ‖v_p − c_{p,k}‖², for the P parts of D/P numbers of a row v; e = [e_1 … e_P] ·
    value. K_i = `centroids` for the most frequent rows of all vocabularies together, `rare_centroids` for the others.
    The gradient goes straight through: ∂L/∂v = ∂L/∂e. `prune` stores a code of one byte for every part of every row
    that is left, never-seen ones included, and the codebook; this can go on learning, with the codes as they are.

    A centroid follows the vectors that have it: the loss has the further term Σ_{p,k} ‖c_{p,k} − m_{p,k}‖² / (2 P K),
    where m is the mean of those in the batch and no gradient goes to them, and c steps a tenth of the way to it. The
    optimizer does not see the codebook, so that neither weight decay nor its rate can part the centroids from the
    vectors. One that no vector had for 100 steps is put on the part of a row drawn at random, a frequent one where
    rare rows do not look. All vocabularies share the codebook: one of its own costs as much as K rows of the table.

    A code is a byte, whichever row it is of: grades make no smaller model than `frequent_share: 1`, but let rare rows
    share more. With that option it is differentiable product quantisation (DPQ) by vector quantisation, and needs no
    `count_rows`. While it learns, it takes more memory than a table.

    Kang et al., "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical Features in Recommender
    Systems", WWW 2020, arXiv 2002.08530; Chen et al., "Differentiable Product Quantization for End-to-End Embedding
    Compression", ICML 2020, arXiv 1908.09756. Both leave the centroids to the optimizer, as a mean over all numbers.

    Args:
        dim: embedding dimension D.
        parts: P, the bytes that a row takes in the end; a divisor of D.
        centroids: K, for each part.
        rare_centroids: how many of them, the first ones, are for rare rows.
        frequent_share: share of the rows that are frequent.
        init_std: standard deviation of the initial numbers of table and codebook.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        dim: PositiveInt = 16,
        parts: PositiveInt = 4,
        centroids: Annotated[int, Field(ge=1, le=256)] = 256,
        rare_centroids: PositiveInt = 64,
        frequent_share: Annotated[float, Field(ge=0, le=1)] = 0.1,
        init_std: PositiveFloat = 1e-4,
    ) -> None:
        super().__init__(schema, dim=dim, init_std=init_std)
        _check(dim, parts, centroids, rare_centroids)
        self.parts, self.rare, self.share = parts, rare_centroids, frequent_share
        self.codebook = nn.Parameter(torch.empty(parts, centroids, dim // parts))
        nn.init.normal_(self.codebook, std=init_std)
        self.frequent: Tensor
        self.used: Tensor
        everything = frequent_share == 1 or rare_centroids == centroids
        self.graded = not everything and frequent_share > 0
        """Whether rows differ in how many centroids they may have."""
        self.needs_counts = self.graded
        self.limit = centroids if everything else rare_centroids
        self.register_buffer("frequent", torch.full((self.weight.shape[0],), everything))
        self.register_buffer("used", torch.zeros(parts, centroids, dtype=torch.bool))
        self.step = 0
        self._counted = not self.graded
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`."""
        self._seen = []
        return super().forward(ids, values)

    def _look_up(self, rows: Tensor) -> Tensor:
        """`[..., C] -> [..., C, D]`."""
        v, flat = super()._look_up(rows), rows.flatten()
        if self.training and len(flat) > len(self.weight):  # every row once is less than what the batch reads
            codes = self._codes(self.weight, self.frequent).index_select(0, flat)
        else:
            codes = self._codes(v.flatten(0, -2), self.frequent.index_select(0, flat))
        e = _joined(codes, self.codebook.detach()).view(v.shape)
        if not self.training:
            return e
        if not torch.compiler.is_compiling():
            self._seen.append((flat, codes))
        return e + (v - v.detach())  # to the last bit e

    @torch.no_grad()
    def _codes(self, v: Tensor, frequent: Tensor) -> Tensor:
        """The nearest centroids that the rows may have, `[n, D], [n] -> [n, P]` int64."""
        v, few = v.reshape(-1, *self.codebook[:, 0].shape), self.codebook[:, : self.limit]
        if not self.graded:
            return _nearest(v, few)
        if v.device.type == "cpu" and not torch.compiler.is_exporting():
            codes = torch.empty(v.shape[:2], dtype=torch.int64)
            for mine, codebook in ((frequent, self.codebook), (~frequent, few)):
                rows = mine.nonzero().squeeze(1)
                codes[rows] = _nearest(v.index_select(0, rows), codebook)
            return codes
        wall = torch.where(frequent, 0.0, torch.inf).to(v.dtype)  # a GPU would have to wait for the number of rows
        return _nearest(v, self.codebook, wall.view(-1, 1, 1), self.limit)

    def penalty(self) -> Tensor:
        """Return Σ ‖c − m‖² / (2 P K) over the centroids that the last batch had, `[]`.

        Raises:
            RecipeError: which rows are frequent is not known.
        """
        if not self._seen:
            return self.codebook.new_zeros(())
        self._expect_counts()
        rows, codes = (torch.cat(x) for x in zip(*self._seen, strict=True))
        centroids = self.codebook.flatten(0, 1)  # [P·K, D/P]
        place = _places(codes, self.codebook.shape[1])
        v = self.weight.detach().index_select(0, rows).view(len(place), -1)
        count = v.new_zeros(len(centroids)).index_add_(0, place, v.new_ones(len(place)))
        mean = torch.zeros_like(centroids).index_add_(0, place, v) / count.clamp(min=1).unsqueeze(1)
        gap = torch.where((count > 0).unsqueeze(1), centroids - mean, 0.0)
        return gap.square().sum() / (2 * len(centroids))

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """The codebook."""
        return (self.codebook,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centroids towards their vectors' means, and those that nothing used to where vectors are."""
        if self.codebook.grad is None:
            return
        gap = self.codebook.grad * self.used.numel()  # c − m
        self.codebook.sub_(RATE * gap)
        self.used |= (gap != 0).any(2)
        self.step += 1
        if self.step % WINDOW == 0:
            self._revive()

    def _revive(self) -> None:
        """Put every centroid that was not used on a row drawn at random; the same one in every process."""
        numbers = torch.Generator().manual_seed(self.step)
        drawn = torch.rand(self.used.shape, generator=numbers, dtype=torch.float64).to(self.weight.device)
        rows = (drawn * len(self.weight)).long()  # [P, K]
        frequent = self.frequent.nonzero().squeeze(1)
        if self.graded and len(frequent):
            rows[:, self.rare :] = frequent[(drawn[:, self.rare :] * len(frequent)).long()]
        part = torch.arange(self.parts, device=rows.device).unsqueeze(1)
        fresh = self.weight.view(len(self.weight), self.parts, -1)[rows, part]
        self.codebook.copy_(torch.where(self.used.unsqueeze(2), self.codebook, fresh))
        self.used.zero_()

    def take_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Remember the rows that the most training rows use; of equal ones the first."""
        if not self.graded:
            return
        total = torch.zeros(len(self.weight), dtype=torch.int64)
        for c in self.layout.columns:
            first = self.layout.offsets[c.vocabulary]
            # Columns that share a vocabulary say the same of it.
            total[first : first + c.rows] = torch.maximum(total[first : first + c.rows], counts[c.name].cpu())
        most = total.sort(descending=True, stable=True).indices[: max(1, round(self.share * len(total)))]
        self.frequent.zero_()
        self.frequent[most.to(self.frequent.device)] = True

    def _expect_counts(self) -> None:
        # Looked up once, as the answer is on the table's device.
        self._counted = self._counted or bool(self.frequent.any())
        if not self._counted:
            raise RecipeError("embedding mgqe: put {use: count_rows} before the first fit stage, or frequent_share: 1")

    def get_extra_state(self) -> Tensor:
        """The number of steps, `[]`: kept by the host, which would else wait for a GPU in every step."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Any) -> None:
        """Go on from a number of steps."""
        self.step = int(state)

    def prune(self, selection: Selection) -> Any:
        """Return the codes and the codebook; the same vectors, and exact zeros for what `selection` drops."""
        kept = kept_columns(self.layout, self.fields.dim, selection)

        def codes(rows: Tensor) -> Tensor:
            if self.weight.is_meta:  # shapes are all there is
                return torch.empty(len(rows), self.parts, device="meta")
            rows = rows.to(self.weight.device)
            return self._codes(self.weight.index_select(0, rows), self.frequent.index_select(0, rows))

        whole = torch.ones(self.parts, dtype=torch.bool)
        return _cut(self.schema, self.fields.dim, kept, whole, codes, self.codebook).train(self.training)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The whole table, the codebook, and which rows are frequent."""
        return {"weight": self.weight.detach(), "codebook": self.codebook.detach(), "frequent": self.frequent}


class Coded(nn.Module):
    """Vectors put together of centroids, by one byte for each part of a row.

    Rows that no column keeps are gone, and parts of which no column keeps a number.

    Args:
        schema: of the inputs.
        dim: D.
        kept: what each column keeps; the fields first, then the histories' columns.
        parts: `[P]` bool, which parts are left.
        rank: which rows are left.
        codes: `[R, P']` uint8.
        codebook: `[P', K, D/P]`.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        dim: int,
        kept: Sequence[Any],
        parts: Tensor,
        rank: Rank,
        codes: Tensor,
        codebook: Tensor,
    ) -> None:
        super().__init__()
        self.schema, self.layout = schema, Layout.of(schema)
        self.fields = Fields(tuple(c.name for c in self.layout.fields), tuple(c.rows for c in self.layout.fields), dim)
        self.kept, self.parts, self.rank = list(kept), parts, rank
        self.codes = nn.Parameter(codes, requires_grad=False)  # a buffer would be sent around in every step
        self.codebook = nn.Parameter(codebook)
        place = None if parts.all() else places(parts.repeat_interleave(dim // len(parts)))
        self.place: Tensor | None
        self.register_buffer("place", place, persistent=False)
        self.groups = tuple(self.layout.histories)
        self.wheres, self.keeps = nn.ModuleList(), nn.ModuleList()
        first = 0
        for columns in column_groups(self.layout):
            self.wheres.append(Where(columns, self.layout.offsets))
            self.keeps.append(Keep(columns, self.kept[first : first + len(columns)]))
            first += len(columns)

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """`[B, F] int64, [B, F] float -> [B, F, D]`.

        Raises:
            ValueError: the schema has numeric fields and `values` is None.
        """
        e, safe = self._vectors(0, ids)
        return scale(e, safe, values, self.schema)

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] int64 -> [B, L, K, D]`."""
        return self._vectors(1 + self.groups.index(group), ids)[0]

    def _vectors(self, group: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> e [..., C, D], guarded ids [..., C]`."""
        rows, safe = self.wheres[group](ids)
        codes = self.codes.index_select(0, self.rank(rows).flatten()).long()
        e = _joined(codes, self.codebook).view(*rows.shape, -1)
        return self.keeps[group](e if self.place is None else widen(e, self.place), safe), safe

    def prune(self, selection: Selection) -> Coded:
        """Return a smaller one still; what is gone stays gone."""
        found = kept_columns(self.layout, self.fields.dim, selection)
        kept = [old.meet(new) for old, new in zip(self.kept, found, strict=True)]

        def codes(rows: Tensor) -> Tensor:
            return self.codes.index_select(0, self.rank(rows if self.codes.is_meta else rows.to(self.codes.device)))

        return _cut(self.schema, self.fields.dim, kept, self.parts, codes, self.codebook).train(self.training)

    def export_tables(self) -> Mapping[str, Tensor]:
        """The codes, the codebook, and every constant that finds a row or says what is gone."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


class Where(nn.Module):
    """From the columns' own ids to rows of all vocabularies together."""

    def __init__(self, columns: Sequence[Column], offsets: Sequence[int]) -> None:
        super().__init__()
        self.guard = Guard(columns)
        self.first: Tensor
        first = torch.tensor([offsets[c.vocabulary] for c in columns], dtype=torch.int64)
        self.register_buffer("first", first, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., C] -> rows [..., C], guarded ids [..., C]`."""
        safe: Tensor = self.guard(ids)
        return safe + self.first, safe


def _check(dim: int, parts: int, centroids: int, rare_centroids: int) -> None:
    if dim % parts:
        divisors = ", ".join(str(p) for p in range(1, dim + 1) if dim % p == 0)
        raise RecipeError(f"embedding mgqe: parts {parts} does not divide dim {dim}; take one of {divisors}")
    if centroids > 256:
        raise RecipeError(f"embedding mgqe: centroids {centroids} is more than the 256 that a byte can tell")
    if rare_centroids > centroids:
        raise RecipeError(f"embedding mgqe: rare_centroids {rare_centroids} is more than centroids {centroids}")


def _nearest(v: Tensor, codebook: Tensor, wall: Tensor | None = None, limit: int = 0) -> Tensor:
    """`[n, P, D/P], [P, K, D/P] -> [n, P]`; `wall [n, 1, 1]` is added to the distances from `limit` on."""
    if torch.compiler.is_exporting():  # a graph knows no number of rows
        return _distance(v, codebook, wall, limit).argmin(2)
    rows = max(1, (_AT_ONCE if v.device.type == "cpu" else _MANY) // codebook[:, :, 0].numel())
    found = []
    for first in range(0, max(len(v), 1), rows):
        part = slice(first, first + rows)
        found.append(_distance(v[part], codebook, None if wall is None else wall[part], limit).argmin(2))
    return torch.cat(found)


def _distance(v: Tensor, codebook: Tensor, wall: Tensor | None, limit: int) -> Tensor:
    """Squared distances, `[n, P, K]`.

    Number by number: a matrix product, or a sum over the last dimension, may give other last bits for another number
    of rows, and then the nearest of two would depend on who looks.
    """
    total: Tensor | None = None
    for j in range(v.shape[2]):
        gap = v[:, :, j].unsqueeze(2) - codebook[:, :, j]
        square = gap.mul_(gap)
        total = square if total is None else total.add_(square)
    found = cast(Tensor, total)
    return found if wall is None else torch.cat([found[..., :limit], found[..., limit:] + wall], 2)


def _joined(codes: Tensor, codebook: Tensor) -> Tensor:
    """`[n, P], [P, K, D/P] -> [n, D]`."""
    parts, count, size = codebook.shape
    return F.embedding(_places(codes, count), codebook.flatten(0, 1)).view(-1, parts * size)


def _places(codes: Tensor, count: int) -> Tensor:
    """Where the centroids stand among those of all parts, `[n, P] -> [n·P]`."""
    return (codes + count * torch.arange(codes.shape[1], device=codes.device)).flatten()


def _cut(
    schema: EncodedSchema,
    dim: int,
    kept: Sequence[Any],
    parts: Tensor,
    codes: Callable[[Tensor], Tensor],
    codebook: Tensor,
) -> Coded:
    """What is kept of a codebook `[P', K, D/P]` whose `parts [P]` are left, with the codes of rows `[n] -> [n, P']`."""
    layout = Layout.of(schema)
    rows, dims = torch.zeros(sum(layout.rows), dtype=torch.bool), torch.zeros(dim, dtype=torch.bool)
    for c, own in zip(layout.columns, kept, strict=True):
        if bool(own.dims.any()):
            rows[layout.offsets[c.vocabulary] :][: c.rows] |= own.numbers(0, c.rows).any(1)
            dims |= own.dims
    left = dims.view(len(parts), -1).any(1) & parts
    left[parts.nonzero()[0]] |= not bool(left.any())  # a table without numbers cannot be read
    rank = Rank(rows, int(left.sum()))
    among, device = left[parts].nonzero().squeeze(1), codebook.device
    among = among if codebook.is_meta else among.to(device)
    with torch.no_grad():
        stored = codes(rank.kept).index_select(1, among).to(torch.uint8)
        cut = Coded(schema, dim, kept, left, rank, stored, codebook.detach().index_select(0, among))
    return cut if codebook.is_meta else cut.to(device)


@hookimpl
def recsys_components() -> list[Component]:
    """Return the embedding, with its stages."""
    stages = (
        {"use": "count_rows"},
        {"use": "fit"},
        {"use": "prune"},
        {"use": "evaluate"},
        {"use": "export"},
    )
    return [Component("embedding", "mgqe", MGQE, stages)]
