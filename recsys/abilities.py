"""What a part may do beside the protocol of its kind: it need not, and is asked whether it can.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from recsys.contracts import Batch, Embedding, Selection


@runtime_checkable
class Regularised(Protocol):
    """An embedding, sequence encoder or interaction with a term of its own in the loss. They need not have one."""

    def penalty(self) -> Tensor:
        """What to add to the loss of the batch that `forward` saw last in training, `[]`."""
        ...


@runtime_checkable
class Supervised(Protocol):
    """An embedding, sequence encoder or interaction with a loss that the labels teach. They need not have one.

    Training asks for it after `forward`, on the same batch; nothing else does. `recsys.api.label_bce` computes the
    usual one from a logit. Being a method is what counts: no other attribute of a part may bear this name.
    """

    def auxiliary(self, batch: Batch) -> Tensor:
        """What to add to the loss of the batch that `forward` saw last in training, `[]`.

        The mean over the B rows, in float32, row weights honoured; a step that is divided over devices or
        micro-batches counts it by `batch.share`, like the loss itself.
        """
        ...


@runtime_checkable
class Divided(Protocol):
    """An interaction whose one logit is the dot product of two sides, which an index of items can find by."""

    def sides(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, F, D] -> [B, W], [B, W]`: what the user's fields give and the item's; the logit is their product.

        That neither reads the other's fields is tested where an index is made.
        """
        ...


@runtime_checkable
class Deciding(Protocol):
    """An embedding that learns itself what to leave out. The stage `prune` asks it beside the selector."""

    def kept(self) -> Selection:
        """The decision so far, for history columns (`group.column`) too; a pure read."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A part that is to take at most so many bytes. It is asked before anything is trained."""

    def check_budget(self, stored: str) -> None:
        """Take note of how a number will be stored, and raise a `RecipeError` where the budget cannot be met.

        The error tells the least possible budget.

        Args:
            stored: float32, or what the recipe's stage `quantize` stores numbers as.
        """
        ...


@runtime_checkable
class Quantizable(Protocol):
    """An embedding that can store its numbers in fewer bits. Tables of the core need not say so."""

    def quantized(self, stored: str) -> Embedding:
        """Return the embedding with its numbers stored as float16 or int8; it need not learn any more."""
        ...


@runtime_checkable
class Lasting(Protocol):
    """An embedding whose decision outlives its weights: `rewind` and `reset` leave it as it is."""

    def decision(self) -> Mapping[str, Tensor]:
        """The entries of its state that say what it leaves out, with the decision as it stands now; a pure read."""
        ...


@runtime_checkable
class Targeted(Protocol):
    """A part that a fit stage, or a bilevel search, trains until it has reached something, such as a size in bytes.

    Until then no epoch is the best one and the stage does not lose patience; it ends with the first epoch after which
    every target is reached, or with its last one, and keeps the weights of that epoch.
    """

    def reached(self) -> bool | None:
        """Asked after every epoch, of every process alike. None: there is no target, or no longer one."""
        ...


@runtime_checkable
class Reorderable(Protocol):
    """A pruned embedding that needs no map from ids to rows once what it keeps has the first ids.

    The stage `export` asks for the order, and renumbers the vocabularies and the first-order weights with it.
    """

    def row_order(self) -> tuple[Tensor | None, ...]:
        """For every vocabulary of the schema, in order, its ids `[rows]` in the order it wants; None: as they are.

        The missing and the unknown value must stay where they are.
        """
        ...

    def reordered(self, orders: tuple[Tensor | None, ...]) -> tuple[Embedding, Selection]:
        """Return the embedding for ids in the new order, and the selection that makes its like of a fresh one."""
        ...


@runtime_checkable
class Stepped(Protocol):
    """A part that changes itself after every optimizer step, beside what the optimizer does."""

    def own_parameters(self) -> tuple[Any, ...]:
        """Parameters that the part updates itself, from their `.grad`; the optimizer leaves them alone."""
        ...

    def after_step(self) -> None:
        """Make the change. Every process makes the same one: random numbers come from a seed and a count of steps.

        The gradients of its own parameters are those of the whole step; they are zero when the step is skipped, and
        gone afterwards.
        """
        ...


@runtime_checkable
class Searched(Protocol):
    """A part with parameters that a bilevel search learns on validation rows, and nothing else changes."""

    def architecture(self) -> tuple[Any, ...]:
        """The parameters; a fit stage leaves them alone. Empty: there is nothing to search."""
        ...

    def search_step(self, rate: float) -> None:
        """Move them by their `.grad`, with step size `rate`, and keep them within their limits."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A part that wants to know how often the training rows use each id. The stage `count_rows` tells it.

    Attributes:
        needs_counts: whether it cannot do without; a recipe without the stage is then refused before it is trained.
    """

    needs_counts: bool

    def take_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Keep what the part needs of them, in buffers, so that it is saved.

        Args:
            counts: column (`group.column` in a history) → int64 `[rows]`, on the CPU: how many training rows use each
                id, once per row however often the row does. Columns that share a vocabulary share its counts: a row
                uses an id if any of them has it. Padding and missing events use none.
        """
        ...


@runtime_checkable
class Scaling(Protocol):
    """A selector that multiplies all that it keeps by one number. What is left of it after `prune` does so too."""

    def factor(self) -> float:
        """The number; it depends on the options alone."""
        ...


@runtime_checkable
class Listwise(Protocol):
    """A loss that compares the rows of a group with each other, such as those of a slate.

    A fit stage then makes batches of whole groups, whose rows stand side by side; `batch_size` rows on the average.

    Attributes:
        compares_groups: whether it does; the context column `group` is to be among its `needs`.
    """

    compares_groups: bool


@runtime_checkable
class Examining(Protocol):
    """A loss, or a propensity model, that learns how likely a look at each position is. The stage `positions` tells."""

    def examination(self) -> Tensor:
        """`[K]`, by position, as a multiple of one of them; a pure read."""
        ...


@runtime_checkable
class Ranking(Protocol):
    """A selector that ranks the fields in a stage of its own, `rank_fields`, not while the model is trained."""

    def rank(self, run: Any) -> Any:
        """Find the fields' importance from `run: recsys.api.Run`, and keep it; returns a `recsys.api.Ranking`.

        Every process comes to the same scores.
        """
        ...


@runtime_checkable
class Choosing(Protocol):
    """A sampler that draws several candidates for each sampled row, and takes one by the model's present scores.

    Attributes:
        candidates: n, how many are drawn for each.
    """

    candidates: int

    def choose(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """Choose one of the n candidates of each of the m sampled rows of a logged row.

        `[N, m, n], [N, m, n] -> [N, m]` int64 in `[0, n)`; logits, and random numbers in (0, 1).
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """A loss that weighs rows, by inverse propensities for instance. Training watches how many rows the weights leave.

    Attributes:
        allow_low_ess: go on where the effective rows, (Σw)²/Σw², are less than 1 % of the rows; an option of the loss.
    """

    allow_low_ess: bool

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weights of a batch's rows, before and after large ones are kept down, each `[B]` float32.

        0 for a row without a weighted part in the loss. A pure read; asked for after the loss itself.
        """
        ...


@runtime_checkable
class Summing(Protocol):
    """A loss that tells facts of its own about the rows of every epoch; they stand in the history with its weights'."""

    def sums(self) -> Any:
        """Of the batch that `forward` saw last, `[S]` float64, added up over batches and processes.

        Zeros before the first one; without gradient.
        """
        ...

    def facts(self, sums: Any) -> Mapping[str, float]:
        """What the sums of an epoch say, by name; NaN where it is undefined."""
        ...


@runtime_checkable
class Checking(Protocol):
    """A stage that can tell, before anything is trained, what the run lacks for it."""

    def check(self, run: Any) -> None:
        """Raise a `RecipeError` where `run: recsys.api.Run`, untrained, has no such column, field or split."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A stage that adds numbers of its own to the results, beside those of `evaluate`; tables may show them."""

    def results(self) -> tuple[str, ...]:
        """Their names among the scores of a split."""
        ...
