"""The model: embedding → selector → sequences → interactions → head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from recsys import abilities, contracts
from recsys.contracts import Batch, EncodedSchema, Fields, Selection
from recsys.errors import PluginError, RecipeError, listing
from recsys.nn.compact import CompactTable
from recsys.nn.head import Head
from recsys.nn.layout import Layout
from recsys.nn.quantize import Stored, quantized
from recsys.nn.reorder import Orders, by_column
from recsys.nn.selection import KeepAll, both
from recsys.nn.sequence import MeanPool
from recsys.nn.sparse import ElementTable
from recsys.nn.table import Table

Histories = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Vectors:
    """What the embedding gives for some rows.

    Args:
        fields: e, `[B, F, D]`.
        histories: group → (its events `[B, L, K, D]`, length `[B]`).
    """

    fields: Tensor
    histories: Histories


class Model(nn.Module):
    """Ids to one logit per task.

        e [B, F, D]      = embedding(ids, values)
        gated [B, F, D]  = selector(e, ids)
        pooled [B, K, D] = sequence(target, history, length)   for each history
        x [B, F', D]     = [gated; pooled …]
        h_i [B, H_i]     = interaction_i(x)
        {task: [B]}      = head(h_1, h_2, …)

    The target of a history is its target fields' vectors as the embedding gives them, before the selector.

    With a head of several members the model is an ensemble: the interactions are those of the first member, then of
    the second, and so on; each member has its own equal part of the D dimensions, and the logit is the mean of the
    members'. In training each member has a loss of its own (`each`), as if it were alone.
    Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017,
    §2.4; here all members see the batches in one order, and differ in their initial weights.

    Args:
        schema: what the encoder produces.
        embedding: ids to vectors.
        selector: gates on the scalar fields' vectors.
        sequences: history group → encoder; one for each history with a target. Bags, which have none, are averaged.
        interactions: built on `Model.consumer_fields(schema, embedding, head.members)`.
        head: built on the same interactions.

    Raises:
        RecipeError: a history with a target has no sequence encoder, or an encoder has no such history.
    """

    def __init__(
        self,
        schema: EncodedSchema,
        embedding: contracts.Embedding,
        selector: contracts.Selector,
        sequences: Mapping[str, contracts.Sequence],
        interactions: Sequence[contracts.Interaction],
        head: Head,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embedding = embedding
        self.selector = selector
        self.interactions = nn.ModuleList(cast("Sequence[nn.Module]", interactions))
        self.head = head
        pools = _pools(schema, sequences, embedding.fields.dim)
        self.sequences = nn.ModuleList(cast("Sequence[nn.Module]", pools))
        names = [f.name for f in schema.fields]
        for i, h in enumerate(schema.histories):
            index = torch.tensor([names.index(t) for t in h.target], dtype=torch.int64)
            self.register_buffer(f"target_{i}", index, persistent=False)

    @staticmethod
    def consumer_fields(schema: EncodedSchema, embedding: contracts.Embedding, members: int = 1) -> Fields:
        """What an interaction sees: the scalar fields, then the pooled columns `group.column` of the histories.

        Raises:
            RecipeError: the dimensions cannot be divided equally between the members.
        """
        columns = Layout.of(schema).columns
        dim = embedding.fields.dim
        if dim % members:
            near = f"{max(dim - dim % members, members)} or {dim - dim % members + members}"
            raise RecipeError(
                f"model.head.ensemble: an embedding of {dim} dimensions cannot be divided equally between {members} "
                f"members; take a multiple of {members}, such as {near}",
                path=("model", "head", "ensemble"),
            )
        return Fields(tuple(c.name for c in columns), tuple(c.rows for c in columns), dim // members)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Logits, `Batch -> {task: [B]}`, float32."""
        return self.logits(batch.ids, batch.values, batch.history)

    def logits(self, ids: Tensor, values: Tensor | None = None, history: Histories | None = None) -> dict[str, Tensor]:
        """Tensors only: `[B, F], [B, F], {group: ([B, L, K], [B])} -> {task: [B]}`, float32."""
        return self.decide(self.represent(ids, values, history), ids, values)

    def each(self, batch: Batch) -> tuple[dict[str, Tensor], ...]:
        """Logits of every member, each `{task: [B]}`; their mean is what `forward` gives."""
        outputs = self._interact(self.represent(batch.ids, batch.values, batch.history))
        return self.head.each(outputs, batch.ids, batch.values)

    def represent(self, ids: Tensor, values: Tensor | None = None, history: Histories | None = None) -> Tensor:
        """What the interactions see, or the members divide, `[B, F', D]`."""
        return self.combine(self.look_up(ids, values, history), ids)

    def look_up(self, ids: Tensor, values: Tensor | None = None, history: Histories | None = None) -> Vectors:
        """The first part of `represent`: what the embedding gives."""
        e = self.embedding(ids, values)
        _expect(self.embedding, e, ("B", ids.shape[1], self.embedding.fields.dim))
        events = {h.name: (history or {})[h.name] for h in self.schema.histories}
        return Vectors(e, {name: (self.embedding.history(name, i), length) for name, (i, length) in events.items()})

    def combine(self, vectors: Vectors, ids: Tensor) -> Tensor:
        """The second part of `represent`: selector and histories, `Vectors, [B, F] -> [B, F', D]`."""
        e = vectors.fields
        parts = [self.selector(e, ids)]
        _expect(self.selector, parts[0], ("B", *e.shape[1:]))
        for i, h in enumerate(self.schema.histories):
            events, length = vectors.histories[h.name]
            events = events.flatten(2)  # [B, L, K, D] -> [B, L, W]
            target = e.index_select(1, self.get_buffer(f"target_{i}")).flatten(1)  # [B, W]
            target = target if h.target else events.new_zeros(ids.shape[0], events.shape[-1])
            pooled = self.sequences[i](target, events, length)  # [B, W]
            _expect(self.sequences[i], pooled, ("B", events.shape[-1]))
            parts.append(pooled.unflatten(1, (len(h.columns), -1)))  # [B, K, D]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def decide(
        self, x: Tensor, ids: Tensor, values: Tensor | None = None, without: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """What follows `represent`: `[B, F', D], [B, F], [B, F] -> {task: [B]}`; ids for the first-order weights.

        The interactions at the places `without` say nothing.
        """
        outputs = self._interact(x)
        for at in without:
            outputs[at] = torch.zeros_like(outputs[at])
        return cast("dict[str, Tensor]", self.head(outputs, ids, values))

    def _interact(self, x: Tensor) -> list[Tensor]:
        """The outputs of the interactions, each `[B, H_i]`."""
        outputs = [interaction(part) for interaction, part in zip(self.interactions, self._seen(x), strict=True)]
        for interaction, output in zip(self.interactions, outputs, strict=True):
            _expect(interaction, output, ("B", cast("contracts.Interaction", interaction).width))
        return outputs

    def _seen(self, x: Tensor) -> list[Tensor]:
        """What each interaction reads of `[B, F', D]`: its member's dimensions."""
        if self.head.members == 1:
            return [x] * len(self.interactions)
        parts = [part.contiguous() for part in x.chunk(self.head.members, 2)]
        return [part for part in parts for _ in range(self.head.count)]

    def objective(
        self, loss: contracts.Loss, batch: Batch, members: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Tensor:
        """What training makes small, `[]`: the members' mean loss, and what the parts add to it.

        Args:
            loss: of the recipe.
            batch: what is learned from.
            members: what `each` gave for the batch, where it is known already.
        """
        members = self.each(batch) if members is None else members
        losses = torch.stack([loss(logits, batch) for logits in members])
        return losses.mean() + self.penalty() + self.auxiliary(batch)

    def penalty(self) -> Tensor:
        """The regularisation of the selector, and of every other part that has one, `[]`."""
        total = self.selector.penalty()
        for part in (self.embedding, *self.sequences, *self.interactions):
            if isinstance(part, abilities.Regularised):
                total = total + part.penalty()
        return total

    def auxiliary(self, batch: Batch) -> Tensor:
        """The losses of the parts that learn from the labels themselves, `[]`; for training, after `forward`."""
        total = torch.zeros((), device=batch.ids.device)
        for part in (self.embedding, *self.sequences, *self.interactions):
            if isinstance(part, abilities.Supervised):
                total = total + part.auxiliary(batch)
        return total

    def prune(self, selection: Selection) -> Model:
        """Return a new, smaller model without the selector; this one stays as it is.

        Its predictions are, bit for bit, those of this model with the dropped parts of the embedding's output
        multiplied by zero (the target of a history included). First-order weights stay, and so does the number by
        which a `Scaling` selector multiplies what it keeps.
        """
        return self._with(self.embedding.prune(selection))

    def row_order(self) -> Orders | None:
        """The order of ids that the pruned embedding wants, so that it needs no map; None if it wants none."""
        if not isinstance(self.embedding, abilities.Reorderable) or not isinstance(self.selector, KeepAll):
            return None
        orders = self.embedding.row_order()
        return orders if any(order is not None for order in orders) else None

    def reordered(self, orders: Orders) -> tuple[Model, Selection]:
        """Return a new model for ids in another order, and the selection that makes its like of a fresh model.

        Its predictions are, bit for bit, those of this one, which stays as it is.
        """
        embedding, selection = cast("abilities.Reorderable", self.embedding).reordered(orders)
        model = self._with(embedding)
        model.head.reorder(by_column(Layout.of(self.schema), orders))
        return model, selection

    def _with(self, embedding: contracts.Embedding) -> Model:
        """A copy with another embedding, and without the selector but for its scale."""
        groups = [h.name for h in self.schema.histories]
        sequences = dict(zip(groups, cast("list[contracts.Sequence]", list(self.sequences)), strict=True))
        model = Model(
            self.schema,
            embedding,
            KeepAll(self.embedding.fields, scale=self.scale),
            copy.deepcopy(sequences),
            copy.deepcopy(cast("list[contracts.Interaction]", list(self.interactions))),
            copy.deepcopy(self.head),
        ).train(self.training)
        device = next(self.head.parameters()).device
        return model if device.type == "meta" else model.to(device)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(table parameters, other parameters): the embedding and the first-order weights, and all the rest.

        Without those that a part updates itself or that a search learns.
        """
        parts = self._parts()
        apart = [p for part in parts if isinstance(part, abilities.Stepped) for p in part.own_parameters()]
        apart += [p for part in parts if isinstance(part, abilities.Searched) for p in part.architecture()]
        seen = {id(p) for p in apart}
        tables = [*self.embedding.parameters(), *self.head.table_parameters().values()]
        tables = [p for p in tables if id(p) not in seen]
        seen |= {id(p) for p in tables}
        return tables, [p for p in self.parameters() if id(p) not in seen]

    def stepped(self) -> list[abilities.Stepped]:
        """The parts that change themselves after every optimizer step."""
        return [part for part in self._parts() if isinstance(part, abilities.Stepped)]

    def searched(self) -> list[abilities.Searched]:
        """The parts with something that a bilevel search learns; one may have it or not, as its options say."""
        return [part for part in self._parts() if isinstance(part, abilities.Searched) and part.architecture()]

    def counting(self) -> list[abilities.Counting]:
        """The parts that want to know how often each id is used."""
        return [part for part in self._parts() if isinstance(part, abilities.Counting)]

    def targeted(self) -> list[abilities.Targeted]:
        """The parts that may have a target for a fit stage to reach."""
        return [part for part in self._parts() if isinstance(part, abilities.Targeted)]

    def reached(self) -> bool | None:
        """Whether all parts with a target have reached it; None if none has one."""
        answers = [part.reached() for part in self.targeted()]
        known = [answer for answer in answers if answer is not None]
        return all(known) if known else None

    def quantized(self, stored: Stored) -> Model:
        """Return a new model with the embedding's numbers in fewer bits; this one stays as it is.

        Raises:
            RecipeError: the selector has not been pruned away yet, or the embedding cannot do it.
        """
        e = self.embedding
        if not isinstance(self.selector, KeepAll):
            raise RecipeError("the selector still gates the numbers; put the stage `prune` before")
        if isinstance(e, abilities.Quantizable):
            return self._with(e.quantized(stored))
        if isinstance(e, Table | CompactTable | ElementTable):
            return self._with(quantized(self.schema, e, stored))
        raise RecipeError(f"the embedding ({type(e).__name__}) has no numbers that could be stored as {stored}")

    def check_budgets(self, stored: Stored) -> None:
        """Raise a `RecipeError` where a part cannot keep to its budget with numbers that are stored so."""
        for part in self._parts():
            if isinstance(part, abilities.Budgeted):
                part.check_budget(stored)

    @property
    def scale(self) -> float:
        """By what the selector multiplies all that it keeps."""
        return self.selector.factor() if isinstance(self.selector, abilities.Scaling) else 1.0

    @property
    def decides(self) -> bool:
        """Whether a part chooses what to leave out."""
        return isinstance(self.embedding, abilities.Deciding) or not isinstance(self.selector, KeepAll)

    def kept(self) -> Selection:
        """What the selector keeps, and the embedding, where it decides."""
        chosen = self.selector.kept()
        return both(chosen, self.embedding.kept()) if isinstance(self.embedding, abilities.Deciding) else chosen

    def scores(self) -> dict[str, float]:
        """Field → importance, as the selector sees it, the mean where it scores values; empty without a selector."""
        if isinstance(self.selector, KeepAll):
            return {}
        return {name: float(score.mean()) for name, score in self.selector.scores().items()}

    def _parts(self) -> list[object]:
        return [self.embedding, self.selector, *self.sequences, *self.interactions]

    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What each interaction looked at, by `<position>.<class>.<name>`."""
        seen = self._seen(self.represent(batch.ids, batch.values, batch.history))
        return {
            f"{i}.{type(part).__name__}.{name}": value
            for i, (part, x) in enumerate(zip(self.interactions, seen, strict=True))
            for name, value in cast("contracts.Interaction", part).explain(x).items()
        }

    def bytes(self) -> int:
        """Bytes that a serving process must hold: the embedding's tables, all other parameters and saved buffers."""
        tables = self.embedding.export_tables().values()
        apart = ("embedding.", "_extra_state")  # the latter is what a part keeps for its training
        state = self.state_dict().items()
        others = [t for n, t in state if not n.startswith(apart[0]) and not n.endswith(apart[1])]
        return sum(t.nbytes for t in (*tables, *others))


class TensorModel(nn.Module):
    """A model whose forward takes tensors, for `torch.export`; B and L are dynamic dimensions."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, values: Tensor | None = None, history: dict[str, tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """`[B, F], [B, F], {group: ([B, L, K], [B])} -> {task: [B]}`."""
        return self.model.logits(ids, values, history)


def _expect(part: object, output: Tensor, shape: tuple[str | int, ...]) -> None:
    """Name the part that gives something else than its protocol says, before the error appears elsewhere."""
    if output.dim() != len(shape) or tuple(output.shape[1:]) != shape[1:]:
        raise PluginError(
            f"{type(part).__name__} gave {[*output.shape]} for a batch of {output.shape[0]} rows, "
            f"expected [{', '.join(map(str, shape))}]"
        )


def _pools(schema: EncodedSchema, sequences: Mapping[str, contracts.Sequence], dim: int) -> list[contracts.Sequence]:
    """One encoder per history, in the schema's order; histories without a target are averaged."""
    groups = [h.name for h in schema.histories]
    for name in sequences:
        if name not in groups:
            raise RecipeError(f"a sequence encoder is given for '{name}'; histories: {listing(groups)}")
    pools: list[contracts.Sequence] = []
    for h in schema.histories:
        if h.target and len(h.target) != len(h.columns):
            raise RecipeError(f"history '{h.name}' has {len(h.columns)} columns but {len(h.target)} target fields")
        if h.target and h.name not in sequences:
            raise RecipeError(f"history '{h.name}' has a target, and needs a sequence encoder")
        pools.append(sequences.get(h.name) or MeanPool(len(h.columns) * dim))
    return pools
