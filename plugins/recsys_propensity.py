"""Propensities from the log itself: how often items, users or labels were shown, or a regression on the fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import softplus

from recsys.api import Batch, Component, DataError, EncodedSchema, RecipeError, hookimpl

Share = Annotated[float, Limits(gt=0, le=1)]
Rows = Literal["positives", "observed", "all"]
Relative = Literal["max", "rows"]


class Popularity(nn.Module):
    """Propensity of an item from how often it occurs: θ_i = max((n_i / max_j n_j)^power, least).

    n_i counts the positive rows, as for Rel-MF; or those that were observed, or all. An item that has none keeps its
    place, with `least`. With `relative_to: rows` it is instead (n_i / rows of the item)^power: the share of the item's
    rows that were observed, for logs that have the others too; of power 1 that is calibrated.

    Saito et al., "Unbiased Recommender Learning from Missing-Not-At-Random Implicit Feedback", WSDM 2020,
    arXiv 1909.03601.

    Args:
        item: field of the item.
        count: which rows count: positives (of the first task), observed (the context column is not 0), all.
        relative_to: max, the most frequent item; or rows, all rows of the item.
        power: η.
        least: least propensity.
    """

    table: Tensor

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        item: str = "item",
        count: Rows = "positives",
        relative_to: Relative = "max",
        power: Annotated[float, Limits(ge=0)] = 0.5,
        least: Share = 1e-3,
    ) -> None:
        super().__init__()
        self.place = _place(schema, item)
        self.task, self.count, self.relative_to = schema.tasks[0], count, relative_to
        self.power, self.least = power, least
        self.register_buffer("table", torch.zeros(schema.fields[self.place].rows))  # 0: not fitted yet

    def fit(self, rows: Iterable[Batch]) -> None:
        """Count rows by item.

        Raises:
            DataError: none counts.
        """
        counted, whole = _counts(rows, [self.place], [len(self.table)], self.task, self.count)[0]
        share = _shares(counted, whole, self.relative_to, self.count)
        self.table.copy_((share**self.power).clamp(self.least, 1.0))

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]`."""
        return _fitted(self.table, "popularity")[batch.ids[:, self.place]]


class UserItem(nn.Module):
    """Propensity of a pair from the shares of its user and of its item: θ_ui = p (p_u/p)^power (p_i/p)^power.

    p is the share of all rows that count, p_u and p_i those of the user's and the item's rows: of power 1, what holds
    if whom and what is shown do not depend on each other. With `relative_to: max`, for logs that have only the rows
    that count, p_u and p_i are n_u / max n and n_i / max n, and p is 1. Between `least` and 1.

    Args:
        user: field of the user.
        item: field of the item.
        count: which rows count: positives (of the first task), observed (the context column is not 0), all.
        relative_to: rows, all rows of the user or item; or max, the most frequent one.
        power: η.
        least: least propensity.
    """

    users: Tensor
    items: Tensor
    share: Tensor

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        user: str = "user",
        item: str = "item",
        count: Rows = "observed",
        relative_to: Relative = "rows",
        power: Annotated[float, Limits(ge=0)] = 1.0,
        least: Share = 1e-3,
    ) -> None:
        super().__init__()
        self.places = [_place(schema, user), _place(schema, item)]
        self.task, self.count, self.relative_to = schema.tasks[0], count, relative_to
        self.power, self.least = power, least
        for name, place in zip(("users", "items"), self.places, strict=True):
            self.register_buffer(name, torch.zeros(schema.fields[place].rows))
        self.register_buffer("share", torch.zeros(()))  # 0: not fitted yet

    def fit(self, rows: Iterable[Batch]) -> None:
        """Count rows by user and by item.

        Raises:
            DataError: none counts.
        """
        sizes = [len(self.users), len(self.items)]
        found = _counts(rows, self.places, sizes, self.task, self.count)
        mean = found[0][0].sum() / found[0][1].sum() if self.relative_to == "rows" else torch.ones(())
        for table, (counted, whole) in zip((self.users, self.items), found, strict=True):
            # Without any row, nothing is known beside the mean.
            share = torch.where(whole > 0, _shares(counted, whole, self.relative_to, self.count), mean)
            table.copy_((share / mean) ** self.power)
        self.share.copy_(mean)

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]`."""
        user, item = (batch.ids[:, place] for place in self.places)
        theta = _fitted(self.share, "user_item") * self.users[user] * self.items[item]
        return theta.clamp(self.least, 1.0)


class NaiveBayes(nn.Module):
    """Propensity of a label by Bayes' rule, from a log and a few uniform rows: θ(y) = P(y, observed) / P(y).

    P(y, observed) = P(y | observed) P(observed). P(y | observed) is counted on the observed rows of the log that are
    not uniform; P(y) on the uniform rows (`uniform` 1), or given as `positive_rate`; P(observed) on all rows that are
    not uniform, or given as `exposure`. It depends on the label: it is for rows that have one. Between `least` and 1.

    Schnabel et al., "Recommendations as Treatments: Debiasing Learning and Evaluation", ICML 2016, §5.1,
    arXiv 1602.05352.

    Args:
        task: whose label; by default the first.
        positive_rate: P(y = 1) among all pairs; by default that of the uniform rows.
        exposure: P(observed); by default the share of observed rows.
        least: least propensity.

    Raises:
        RecipeError: no such task.
    """

    table: Tensor

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        task: str | None = None,
        positive_rate: Annotated[float, Limits(gt=0, lt=1)] | None = None,
        exposure: Share | None = None,
        least: Share = 1e-3,
    ) -> None:
        super().__init__()
        if task is not None and task not in schema.tasks:
            raise RecipeError(f"no task '{task}'.{_near(task, schema.tasks)} Tasks: {', '.join(schema.tasks)}")
        self.task = task or schema.tasks[0]
        self.positive_rate, self.exposure, self.least = positive_rate, exposure, least
        self.register_buffer("table", torch.zeros(2))  # 0: not fitted yet

    def fit(self, rows: Iterable[Batch]) -> None:
        """Count labels.

        Raises:
            DataError: there are no uniform rows and no `positive_rate`; or a class is missing.
        """
        # [uniform, observed, label] rows
        counts = torch.zeros(8, dtype=torch.float64)
        for batch in rows:
            uniform = batch.context.get("uniform", torch.zeros(len(batch), dtype=torch.int64))
            code = 4 * uniform + 2 * _chosen(batch, "observed", self.task).long() + batch.label[self.task].long()
            counts += torch.bincount(code, minlength=8)
        logged, uniform = counts.view(2, 2, 2)
        known = uniform.sum(0)
        if self.positive_rate is not None:
            prior = torch.tensor([1 - self.positive_rate, self.positive_rate], dtype=torch.float64)
        elif known.min() > 0:
            prior = known / known.sum()
        else:
            raise DataError(
                f"propensity 'naive_bayes': P(y) needs uniform rows of both labels, there are {int(known[0])} of 0 and "
                f"{int(known[1])} of 1; name a context column `uniform`, or give the option positive_rate"
            )
        seen = logged[1]
        if not seen.min():
            raise DataError(
                f"propensity 'naive_bayes': of the observed rows, {int(seen[0])} have label 0 and {int(seen[1])} label "
                "1; both are needed"
            )
        exposure = seen.sum() / logged.sum() if self.exposure is None else self.exposure
        self.table.copy_((seen / seen.sum() * exposure / prior).clamp(self.least, 1.0))

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]`."""
        return _fitted(self.table, "naive_bayes")[batch.label[self.task].long()]


class Logistic(nn.Module):
    """Propensity by logistic regression of `observed` on the fields: θ = σ(b + Σ_f w_f x_f), one weight per value.

    The weights minimise the mean cross-entropy over all rows of the log plus (l2/2) ‖w‖²; observed and other rows must
    be there. L-BFGS over whole passes, in float64: the same rows give the same weights. A value without rows has the
    weight 0. Between `least` and 1.

    Schnabel et al., "Recommendations as Treatments: Debiasing Learning and Evaluation", ICML 2016, §5.2,
    arXiv 1602.05352.

    Args:
        fields: what it sees; by default all scalar fields.
        l2: of the weights, but not of b.
        steps: most steps; each takes at least one pass over the rows.
        least: least propensity.
    """

    weight: Tensor
    bias: Tensor
    fitted: Tensor
    places: Tensor
    offsets: Tensor

    def __init__(
        self,
        schema: EncodedSchema,
        *,
        fields: tuple[str, ...] | None = None,
        l2: Annotated[float, Limits(ge=0)] = 1e-4,
        steps: PositiveInt = 100,
        least: Share = 1e-3,
    ) -> None:
        super().__init__()
        names = [field.name for field in schema.fields] if fields is None else list(fields)
        places = [_place(schema, name) for name in names]
        sizes = torch.tensor([schema.fields[place].rows for place in places])
        self.l2, self.steps, self.least = l2, steps, least
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("weight", torch.zeros(int(sizes.sum()), dtype=torch.float64))
        self.register_buffer("bias", torch.zeros((), dtype=torch.float64))
        self.register_buffer("fitted", torch.zeros(()))

    def fit(self, rows: Iterable[Batch]) -> None:
        """Minimise.

        Raises:
            DataError: all rows are observed, or none is.
        """
        shown = torch.stack([_chosen(batch, "observed", "").double().sum() for batch in rows]).sum()
        count = sum(len(batch) for batch in rows)
        if not 0 < shown < count:
            raise DataError(
                f"propensity 'logistic': {int(shown)} of {count} rows are observed; rows of both kinds are needed, "
                "told apart by the context column `observed`"
            )
        weight = self.weight.zero_().clone().requires_grad_()
        bias = torch.logit(shown / count).requires_grad_()
        search = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.steps,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            search.zero_grad()
            total = 0.5 * self.l2 * (weight**2).sum()
            total.backward()  # type: ignore[no-untyped-call]
            for batch in rows:
                z, o = self._logit(batch, weight, bias), _chosen(batch, "observed", "").double()
                part = (softplus(z) - o * z).sum() / count
                part.backward()  # type: ignore[no-untyped-call]
                total = total.detach() + part.detach()
            return total

        search.step(objective)  # type: ignore[no-untyped-call]
        self.weight.copy_(weight.detach())
        self.bias.copy_(bias.detach())
        self.fitted.fill_(1.0)

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]`."""
        _fitted(self.fitted, "logistic")
        return torch.sigmoid(self._logit(batch, self.weight, self.bias)).float().clamp(self.least, 1.0)

    def _logit(self, batch: Batch, weight: Tensor, bias: Tensor) -> Tensor:
        """`Batch -> [B]` float64."""
        x = weight[batch.ids[:, self.places] + self.offsets]  # [B, F]
        return bias + (x if batch.values is None else x * batch.values[:, self.places]).sum(1)


def _place(schema: EncodedSchema, name: str) -> int:
    """The field's place.

    Raises:
        RecipeError: there is none of that name.
    """
    names = [field.name for field in schema.fields]
    if name not in names:
        raise RecipeError(f"no field '{name}'.{_near(name, names)} Fields: {', '.join(names)}")
    return names.index(name)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def _fitted(table: Tensor, name: str) -> Tensor:
    """The table, if something was fitted.

    Raises:
        DataError: nothing was.
    """
    if not bool(table.any()):
        raise DataError(f"propensity '{name}': nothing has been fitted yet")
    return table


def _chosen(batch: Batch, count: Rows, task: str) -> Tensor:
    """Which rows count, `[B]` bool; a log without `observed` has observed rows only."""
    if count == "positives":
        return batch.label[task] != 0
    if count == "observed" and "observed" in batch.context:
        return batch.context["observed"] != 0
    return torch.ones(len(batch), dtype=torch.bool)


def _counts(
    rows: Iterable[Batch], places: Sequence[int], sizes: Sequence[int], task: str, count: Rows
) -> list[tuple[Tensor, Tensor]]:
    """For each place, the rows of every id that count, and all of them, `[rows]` float64."""
    found = [(torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)) for size in sizes]
    for batch in rows:
        chosen = _chosen(batch, count, task)
        for (counted, whole), place, size in zip(found, places, sizes, strict=True):
            counted += torch.bincount(batch.ids[chosen, place], minlength=size)
            whole += torch.bincount(batch.ids[:, place], minlength=size)
    return found


def _shares(counted: Tensor, whole: Tensor, relative_to: Relative, count: Rows) -> Tensor:
    """Return n / max n, or n / all rows of the id; 0 for an id without rows.

    Raises:
        DataError: no row counts.
    """
    if not bool(counted.any()):
        raise DataError(f"a propensity that counts {count} rows: there are none among {int(whole.sum())}")
    return counted / (counted.max() if relative_to == "max" else whole.clamp(min=1))


@hookimpl
def recsys_components() -> list[Component]:
    """Return what this plugin brings."""
    return [
        Component("propensity", "popularity", Popularity),
        Component("propensity", "user_item", UserItem),
        Component("propensity", "naive_bayes", NaiveBayes),
        Component("propensity", "logistic", Logistic),
    ]
