"""Off-policy evaluation: what a policy made from the model would have earned, from the log of another policy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from rich.table import Table as TextTable
from torch import Tensor

from recsys.api import (
    FIRST_ID,
    Batch,
    Component,
    DataError,
    EvalBatches,
    RecipeError,
    Run,
    gather_rows,
    hookimpl,
)

Policy = Literal["softmax", "greedy", "uniform", "logged"]
Share = Annotated[float, Field(ge=0, le=1)]
WARN = 0.1
"""Effective rows, as a share of all, below which an estimate is told with a warning."""
LARGEST_Z = 4.0
"""Standard errors that the mean weight may be away from 1, its expectation, without a warning."""
ROUNDING = 1e-4
"""How far it may be away where weights do not vary: propensities are numbers of 32 bits, and often rounded."""


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def estimates(
    weight: Tensor, reward: Tensor, direct: Tensor, imputed: Tensor, level: float, group: Tensor | None = None
) -> dict[str, Estimate]:
    """Return the estimates of a policy's value by name, `[n]` float64 each.

    Bounds are normal, from how each row moves the estimate; rows of a group move it together.

    Args:
        weight: w = π(a|x)/θ of the logged action.
        reward: r.
        direct: Σ_a π(a|x) q(x, a), what the model expects of the policy.
        imputed: q of the logged action.
        level: of the confidence intervals.
        group: rows that are not independent of each other, such as those of a user.
    """
    mean = weight.mean()
    snips = (weight * reward).sum() / weight.sum()
    terms = {
        "ips": weight * reward,
        "snips": snips + weight * (reward - snips) / mean,
        "dm": direct,
        "dr": direct + weight * (reward - imputed),
    }
    return {name: _estimate(term, level, group) for name, term in terms.items()}


def _estimate(term: Tensor, level: float, group: Tensor | None) -> Estimate:
    """The mean of a term and its bounds."""
    value, error = float(term.mean()), standard_error(term, group)
    # Without any spread, as where no rewarded row has weight, nothing tells how far off the estimate is.
    reach = NormalDist().inv_cdf((1 + level) / 2) * error if error > 0 else math.nan
    return Estimate(value, value - reach, value + reach)


def standard_error(term: Tensor, group: Tensor | None) -> float:
    """Of the mean of a term, whose rows are summed by group first; 0 where there is one group."""
    moved = term - term.mean()
    if group is not None:
        _, member = torch.unique(group, return_inverse=True)
        moved = moved.new_zeros(int(member.max()) + 1).index_add_(0, member, moved)
    groups = len(moved)
    return math.sqrt(float(moved.square().sum()) * groups / max(groups - 1, 1)) / len(term) if groups > 1 else 0.0


def effective(weight: Tensor) -> float:
    """Effective sample size (Σw)² / Σw²; 0 where there is no weight."""
    square = float(weight.square().sum())
    return float(weight.sum()) ** 2 / square if square else 0.0


class PolicyValue:
    """Estimate what policies made from the model's scores would earn, from what another policy has logged.

    Each row is a context x with the action a that was taken, its reward r (the label) and the chance θ with which it
    was taken (context column `propensity`). The model scores every known action in the place of the logged one: z. The
    policies: softmax, π ∝ exp(z / temperature); greedy, the best action, ties shared; uniform; logged, the one that
    wrote the log, whose value is the plain mean. With w = π(a|x)/θ and q = σ(z):

    ips: mean w r. snips: Σ w r / Σ w. dm: mean Σ_a π q, what the model thinks of itself, right only if q is.
    dr: mean Σ_a π q + w (r − q(a)), right if θ or q is.

    The rows must not have taught the model. Bounds are of a normal distribution, rows of a group (context column
    `group`) taken together. Little overlap between the policies leaves few effective rows, (Σw)²/Σw²: below
    `least_ess` of the rows the stage fails, below 0.1 it warns; so it does where the mean of w, which is 1 on average,
    is 4 standard errors off.

    With few rewards a normal distribution is a rough one; without any there are no bounds.

    Results go to `policy_value.json`, and beside the metrics of the run as `test[policy=greedy]`.

    Li et al., "Unbiased Offline Evaluation of Contextual-bandit-based News Article Recommendation Algorithms", WSDM
    2011; Swaminathan and Joachims, "The Self-Normalized Estimator for Counterfactual Learning", NeurIPS 2015; Dudík,
    Langford and Li, "Doubly Robust Policy Evaluation and Learning", ICML 2011.

    Args:
        action: categorical field that holds the action.
        follows: categorical fields that the action decides, such as its category; they change with it.
        policies: which ones.
        temperature: of the softmax.
        split: whose rows are used.
        floor: least propensity; smaller ones count as this, which trades variance for bias.
        level: of the confidence intervals.
        least_ess: least effective sample size as a share of the rows; 0 allows any.

    Raises:
        RecipeError: a field or a context column is missing, or there are several tasks.
        DataError: when it runs: a propensity is impossible, or all lie below the floor; too few effective rows.
    """

    name = "policy_value"

    def __init__(
        self,
        *,
        action: str,
        follows: tuple[str, ...] = (),
        policies: tuple[Policy, ...] = ("greedy", "softmax", "uniform", "logged"),
        temperature: PositiveFloat = 1.0,
        split: Literal["valid", "test"] = "test",
        floor: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        level: Annotated[float, Field(gt=0, lt=1)] = 0.95,
        least_ess: Share = 0.01,
    ) -> None:
        self.action, self.follows, self.policies = action, follows, policies
        self.temperature, self.split, self.floor = temperature, split, floor
        self.level, self.least_ess = level, least_ess

    def check(self, run: Run) -> None:
        """Refuse, before anything is trained, what it cannot work with."""
        fields = [field.name for field in run.schema.fields if not field.numeric]
        for option, name in (("action", self.action), *(("follows", name) for name in self.follows)):
            if name not in fields:
                raise RecipeError(f"{run.stage}: {option}: '{name}' is no categorical field. There are: {fields}")
        if "propensity" not in run.schema.context:
            raise RecipeError(
                f"{run.stage}: needs the chance of each logged action; name its column under data.context, "
                "`propensity: COLUMN`"
            )
        if len(run.schema.tasks) > 1:
            raise RecipeError(f"{run.stage}: the reward must be one label; there are {list(run.schema.tasks)}")
        run.split(self.split)

    def run(self, run: Run) -> None:
        """Estimate, tell, and write `policy_value.json`."""
        self.check(run)
        rows = self._rows(run)
        propensity = rows["propensity"]
        check_propensities(propensity, self.floor)
        theta = propensity.clamp(min=self.floor)
        facts: dict[str, dict[str, float]] = {}
        for policy in self.policies:
            logged = policy == "logged"
            weight = torch.ones_like(theta) if logged else rows[f"{policy}.chance"] / theta
            direct = rows["imputed"] if logged else rows[f"{policy}.direct"]
            facts[policy] = self._facts(run, policy, weight, rows["reward"], direct, rows["imputed"], rows.get("group"))
        if run.world.leads:
            run.stage_folder.mkdir(parents=True, exist_ok=True)
            written = {p: {n: None if math.isnan(v) else v for n, v in found.items()} for p, found in facts.items()}
            (run.stage_folder / "policy_value.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            run.console.print(_table(run.stage, facts, len(theta)))
        for name, found in facts.items():
            run.scores.setdefault(f"{self.split}[policy={name}]", {}).update(found)

    def _facts(
        self,
        run: Run,
        policy: str,
        weight: Tensor,
        reward: Tensor,
        direct: Tensor,
        imputed: Tensor,
        group: Tensor | None,
    ) -> dict[str, float]:
        """The estimates of a policy with their bounds, and how much they rest on.

        Raises:
            DataError: too few effective rows.
        """
        ess, rows = effective(weight), len(weight)
        share = f"{ess:,.1f} effective rows of {rows:,} ({ess / rows:.2%})"
        if ess < self.least_ess * rows or ess == 0:
            top = float(weight.max() / weight.sum()) if ess else 0.0
            raise DataError(
                f"{run.stage}: the policy '{policy}' leaves {share}, below `least_ess` {self.least_ess:.2%}; one row "
                f"has {top:.1%} of the weight. It takes other actions than the log: take a log that tries more, a "
                "policy nearer to it, or a `floor`, which biases"
            )
        if ess < WARN * rows:
            run.say(f"[yellow]warning: {run.stage}: the policy '{policy}' leaves {share}; bounds are wide[/yellow]")
        mean, error = float(weight.mean()), standard_error(weight, group)
        if abs(mean - 1) > max(LARGEST_Z * error, ROUNDING):
            run.say(
                f"[yellow]warning: {run.stage}: the weights of the policy '{policy}' are {mean:.3f} ± {error:.3f} on "
                "average, far from 1: the propensities do not fit the log, or actions that the policy takes never "
                "occur in it[/yellow]"
            )
        found: dict[str, float] = {}
        for name, estimate in estimates(weight, reward, direct, imputed, self.level, group).items():
            found |= {name: estimate.value, f"{name}.low": estimate.low, f"{name}.high": estimate.high}
        return {**found, "ess": ess, "mean_weight": mean, "rows": float(rows)}

    def _rows(self, run: Run) -> dict[str, Tensor]:
        """What the estimates need of each row of the split, `[rows]` on the CPU, from all processes."""
        field, followers, table = self._actions(run)
        shards = run.split(self.split)
        size = max(1, run.train.eval_batch_size // len(table))
        parts: dict[str, list[Tensor]] = {}
        was_training = run.model.training
        run.model.eval()
        with torch.inference_mode():
            for _, batch in EvalBatches(shards, size, rank=run.world.rank, ranks=run.world.size):
                task = run.schema.tasks[0]
                wide = placed(batch, field, followers, table).to(run.device)
                z = run.model(wide)[task].double().cpu().view(len(batch), len(table))
                found = self._of_batch(
                    batch, z, batch.ids[:, field], table[:, 0], run.model(batch.to(run.device))[task]
                )
                found |= {"reward": batch.label[task].double(), "propensity": batch.context["propensity"].double()}
                found |= {"group": batch.context["group"]} if "group" in batch.context else {}
                for name, values in found.items():
                    parts.setdefault(name, []).append(values)
        run.model.train(was_training)
        names = sorted(self._names(run))
        kinds = {name: torch.int64 if name == "group" else torch.float64 for name in names}
        local = {n: torch.cat(parts[n]) if n in parts else torch.empty(0, dtype=kinds[n]) for n in names}
        return {name: gather_rows(values.to(run.device)).cpu() for name, values in local.items()}

    def _names(self, run: Run) -> Iterator[str]:
        yield from ("reward", "propensity", "imputed")
        yield from ("group",) if "group" in run.schema.context else ()
        for policy in self.policies:
            yield from (f"{policy}.chance", f"{policy}.direct") if policy != "logged" else ()

    def _of_batch(self, batch: Batch, z: Tensor, logged: Tensor, actions: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Chance of the logged action and expected reward under each policy, `[B]`; z is `[B, A]`."""
        if not bool(torch.isfinite(z).all()):
            raise DataError("the model's prediction for an action is not finite; training has diverged")
        q, taken = torch.sigmoid(z), logged[:, None] == actions  # [B, A]
        found = {"imputed": torch.sigmoid(own.double().cpu())}
        for policy in self.policies:
            if policy == "logged":
                continue
            chance = chances(z, policy, self.temperature)
            found[f"{policy}.chance"] = (chance * taken).sum(1)
            found[f"{policy}.direct"] = (chance * q).sum(1)
        return found

    def _actions(self, run: Run) -> tuple[int, list[int], Tensor]:
        """Index of the action's field and of those that follow it, and the known actions with these, `[A, 1 + K]`.

        Raises:
            DataError: a field does not follow from the action, or the train split has no known action.
        """
        names = [field.name for field in run.schema.fields]
        columns = [names.index(name) for name in (self.action, *self.follows)]
        seen = [batch.ids[:, columns] for _, batch in EvalBatches(run.split("train"), run.train.eval_batch_size)]
        table = torch.unique(torch.cat([torch.unique(ids, dim=0) for ids in seen]), dim=0)
        table = table[table[:, 0] >= FIRST_ID]
        if not len(table):
            raise DataError(f"{run.stage}: no row of the train split has a known value of '{self.action}'")
        action, count = torch.unique(table[:, 0], return_counts=True)
        if bool((count > 1).any()):
            first = table[table[:, 0] == action[count > 1][0]]
            changing = [name for i, name in enumerate(self.follows, 1) if len(first[:, i].unique()) > 1]
            raise DataError(
                f"{run.stage}: follows: {changing} are not decided by '{self.action}': its id {int(first[0, 0])} comes "
                f"with {len(first)} different ones"
            )
        return columns[0], columns[1:], table


def placed(batch: Batch, field: int, followers: list[int], table: Tensor) -> Batch:
    """Every row with each of the actions, `[B] -> [B · A]`, the actions of a row side by side."""
    rows = torch.arange(len(batch)).repeat_interleave(len(table))
    ids = batch.ids[rows]
    ids[:, [field, *followers]] = table.repeat(len(batch), 1)
    return replace(
        batch,
        ids=ids,
        values=None if batch.values is None else batch.values[rows],
        history={name: (events[rows], length[rows]) for name, (events, length) in batch.history.items()},
        label={},
        context={},
    )


def chances(z: Tensor, policy: str, temperature: float) -> Tensor:
    """π(a|x) of scores `[B, A]`; the best actions of a greedy policy share their row."""
    if policy == "softmax":
        return torch.softmax(z / temperature, 1)
    best = torch.ones_like(z) if policy == "uniform" else (z == z.amax(1, keepdim=True)).double()
    return best / best.sum(1, keepdim=True)


def check_propensities(theta: Tensor, floor: float) -> None:
    """Refuse what is no chance of an action that was taken.

    Raises:
        DataError: a propensity is not in (0, 1]; or all lie below the floor.
    """
    bad = ~((theta > 0) & (theta <= 1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"propensity of row {row + 1} is {float(theta[row]):g}, expected a number in (0, 1] ({int(bad.sum())} of "
            f"{len(bad)} rows are not)"
        )
    if bool((theta < floor).all()):
        raise DataError(
            f"all {len(theta)} propensities lie below `floor` {floor:g} (the largest is {float(theta.max()):.3g}): "
            "every weight is cut off, and corrects nothing; lower `floor`"
        )


def _table(title: str, facts: Mapping[str, Mapping[str, float]], rows: int) -> TextTable:
    table = TextTable(title=f"{title}: {rows:,} rows", title_justify="left")
    table.add_column("policy")
    for name in ("ips", "snips", "dr", "dm", "effective rows"):
        table.add_column(name, justify="right")
    for policy, found in facts.items():
        cells = [_cell(found, name) for name in ("ips", "snips", "dr")]
        table.add_row(policy, *cells, f"{found['dm']:.5f}", f"{found['ess']:,.1f}")
    return table


def _cell(found: Mapping[str, float], name: str) -> str:
    low, high = found[f"{name}.low"], found[f"{name}.high"]
    return f"{found[name]:.5f} ({'no bounds' if math.isnan(low) else f'{low:.5f}–{high:.5f}'})"


@hookimpl
def recsys_components() -> list[Component]:
    """Return the stage."""
    return [Component("stage", "policy_value", PolicyValue)]
