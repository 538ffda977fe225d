"""What was wrong with the step that stopped training: its rows, the suspicious ones, gradients and parameters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID, Batch, Field
from recsys.data.batches import TrainBatches
from recsys.data.encode import Encoder
from recsys.data.groups import GroupBatches
from recsys.data.order import Order, WindowOrder, divide
from recsys.data.vocabulary import Vocabulary
from recsys.errors import NonFiniteError
from recsys.train.checkpoint import write_json
from recsys.train.distributed import gather_rows, wait_for_all
from recsys.train.guard import Buffers, RandomState
from recsys.train.run import Run
from recsys.train.sampled import choose_sampled

WORST = 5
"""Rows, and parameters, that a message shows; the file has more."""
FIELDS = 8
"""Fields of a row that a message shows."""
MOST = 100
"""Suspicious rows that the file describes."""
REPORT = "non_finite.json"

Masks = dict[str, Tensor]
"""What speaks against rows → bool `[B]`, in the order of cause and effect."""


@dataclass(frozen=True)
class Part:
    """What one rank's part of a step shows when it is computed again.

    Args:
        batches: its micro-batches, n rows together.
        rows: `[n]` int64, numbers of its rows in the encoded train split, from 0; -1 where they are not known.
        losses: of its micro-batches.
        suspicion: what speaks against the suspicious rows.
        suspects: positions among the n rows, the worst first.
        suspicious: how many rows it speaks against; 0 if against none.
        gradients: parameter → (entries of its gradient that are not finite, entries, largest finite magnitude).
    """

    batches: list[Batch]
    rows: npt.NDArray[np.int64]
    losses: list[float]
    suspicion: str
    suspects: list[int]
    suspicious: int
    gradients: dict[str, tuple[int, int, float]]


def rows_of(
    batches: TrainBatches | GroupBatches, epoch: int, step: int, given: Sequence[Batch]
) -> npt.NDArray[np.int64]:
    """Return the rows of this rank in a step, `[n]` int64, numbered from 0 in the encoded split.

    Args:
        batches: of the stage.
        epoch: from 0.
        step: of the epoch, from 0.
        given: the micro-batches of the step; where the rows that were found are not theirs, the numbers are -1:
            rather none than wrong ones.
    """
    if isinstance(batches, GroupBatches):
        return np.concatenate([batches.part(epoch, step, micro)[0] for micro in range(len(given))])
    found = []
    for micro, batch in enumerate(given):
        low, high, _ = batches.bounds(step, micro)
        candidates = _candidates(batches, epoch, low, high)
        logged = batch.ids[: high - low]
        same = (rows for rows in candidates if torch.equal(batches.shards.gather(rows).ids, logged))
        rows = next(same, np.full(high - low, -1))
        found.append(np.concatenate([rows, rows.repeat(batch.negatives)]))  # a sampled row has its logged row's number
    return np.concatenate(found)


def _candidates(batches: TrainBatches, epoch: int, low: int, high: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows at positions `low … high - 1` in the orders that an epoch may be read in."""
    size = batches.rows
    positions = np.arange(low, high)
    yield batches.numbers(Order(size, batches.seed, epoch).rows(positions))
    if size < len(batches.shards):
        return
    if memory := int(batches.shuffle_memory * 2**20):
        windows = divide(size, batches.shards.size, memory)
        yield WindowOrder(size, *windows, batches.seed, epoch).rows(positions)


def repeat(run: Run, batches: TrainBatches | GroupBatches, epoch: int, step: int, random: RandomState) -> Part:
    """Compute this rank's part of a step again, with the random numbers it had, and look at it closely.

    The model must be as it was before the step, and is so afterwards; other ranks are not touched.
    """
    random.restore(run.device)
    buffers = Buffers(run.model)
    buffers.remember()
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    sums: dict[str, Tensor] = {}
    losses, scores = [], []
    masks: dict[str, list[Tensor]] = {}
    drawn = [part.to(run.device) for part in itertools.islice(batches.epoch(epoch, step), batches.accumulate)]
    given = [choose_sampled(run.model, batches.sampled, batch) for batch in drawn]
    for batch in given:
        with _output(cast("nn.Module", run.model.embedding)) as embedded, _autocast(run):
            members = run.model.each(batch)
            loss = run.model.objective(run.loss, batch, members)
        logits = [z for member in members for z in member.values()]
        inner = [*logits, *embedded]
        gradients = torch.autograd.grad(loss, [*named.values(), *inner], allow_unused=True)
        for name, g in zip(named, gradients, strict=False):
            if g is not None:
                sums[name] = sums.get(name, 0) + g.detach()
        for why, mask in _against(batch, logits, embedded, gradients[len(named) :]).items():
            masks.setdefault(why, []).append(mask.cpu())
        losses.append(float(loss.detach()))
        scores.append(torch.stack([z.detach().abs().double() for z in logits]).amax(0).cpu())
    buffers.restore_where(torch.ones((), dtype=torch.bool, device=run.device))
    suspicion, suspects, suspicious = _suspects({why: torch.cat(m) for why, m in masks.items()}, torch.cat(scores))
    bad = {name: _bad_entries(g) for name, g in sums.items()}
    given = [batch.to("cpu") for batch in given]
    return Part(given, rows_of(batches, epoch, step, given), losses, suspicion, suspects, suspicious, bad)


def stop(
    run: Run, batches: TrainBatches | GroupBatches, step: int, random: RandomState, skipped: Sequence[int]
) -> NoReturn:
    """Say what was wrong with step `step` of the stage, from 0; write it to `non_finite.json` of the stage's folder.

    Every rank must come here; the first one tells.

    Raises:
        NonFiniteError: always.
    """
    epoch, inside = divmod(step, batches.steps)
    headline = f"{run.stage}: epoch {epoch + 1}, step {inside + 1} of {batches.steps}"
    part = repeat(run, batches, epoch, inside, random)
    parts = _from_all_ranks(_described(run, part), run.device)
    if not run.world.leads:
        wait_for_all()
        raise NonFiniteError(f"{headline}: stopped, as the first process tells")
    parameters = {name: int((~torch.isfinite(p)).sum()) for name, p in run.model.named_parameters()}
    facts = {
        "epoch": epoch + 1,
        "step": inside + 1,
        "steps_per_epoch": batches.steps,
        "skipped_steps_before": len(skipped),
        "parameters": {name: count for name, count in parameters.items() if count},
        "row_numbers_start_at": 1,
        "ranks": parts,
    }
    write_json(run.stage_folder / REPORT, facts)
    wait_for_all()
    raise NonFiniteError("\n".join([headline + ": " + _what(parts), *_details(run, facts, parts, skipped)]))


@contextmanager
def _output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first output of a module while the block runs."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, given: Any, output: Tensor) -> None:
        if not outputs and output.requires_grad:
            outputs.append(output)

    handle = module.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.train.precision == "bf16")


def _against(batch: Batch, logits: list[Tensor], embedded: list[Tensor], gradients: Sequence[Tensor | None]) -> Masks:
    """Find rows with numbers that are not finite, from the input to the loss and back."""
    size = len(batch)

    def bad(tensors: Sequence[Tensor | None]) -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool, device=batch.ids.device)
        for t in tensors:
            if t is not None and t.is_floating_point():
                mask |= ~torch.isfinite(t.detach()).reshape(size, -1).all(1)
        return mask

    return {
        "a value, label or context that is not finite": bad(
            [batch.values, *batch.label.values(), *batch.context.values()]
        ),
        "an embedding vector that is not finite": bad(embedded),
        "a logit that is not finite": bad(logits),
        "a gradient of the loss by the logit that is not finite": bad(gradients[: len(logits)]),
        "a gradient at the embedding's output that is not finite": bad(gradients[len(logits) :]),
    }


def _suspects(masks: Masks, scores: Tensor) -> tuple[str, list[int], int]:
    """Choose what speaks against the fewest rows; among those, and else among all, the largest logits come first."""
    counts = {why: int(mask.sum()) for why, mask in masks.items()}
    found = [why for why, count in counts.items() if count]
    order = torch.nan_to_num(scores, nan=math.inf, posinf=math.inf).argsort(descending=True, stable=True)
    if not found:
        return "the largest logits of the step", order[:WORST].tolist(), 0
    why = min(found, key=lambda name: counts[name])
    return why, order[masks[why][order]][:MOST].tolist(), counts[why]


def _bad_entries(g: Tensor) -> tuple[int, int, float]:
    finite = torch.isfinite(g)
    return int((~finite).sum()), g.numel(), float(torch.where(finite, g.abs(), 0).max())


def _described(run: Run, part: Part) -> dict[str, Any]:
    """Turn a part into plain values; rows are numbered from 1 as in all messages."""
    batch = run.split("train").gather(part.rows[part.suspects])
    shown = [{"row": int(part.rows[at]) + 1, **_fields(run.encoder, batch, i)} for i, at in enumerate(part.suspects)]
    order = sorted(part.gradients.items(), key=lambda item: (-item[1][0], -item[1][2]))
    return {
        "rank": run.world.rank,
        "losses": [str(loss) for loss in part.losses],
        "suspicion": part.suspicion,
        "suspicious_rows": part.suspicious,
        "suspects": shown,
        "gradients": [{"parameter": n, "not_finite": c, "entries": e, "largest": m} for n, (c, e, m) in order],
        "rows": (part.rows + 1).tolist(),
    }


def _fields(encoder: Encoder, batch: Batch, i: int) -> dict[str, Any]:
    """Return field → raw value (or what stands for it) of row `i` of a batch, then its labels."""
    values = {
        field.name: _raw(encoder, field, int(batch.ids[i, f]), None if batch.values is None else batch.values[i, f])
        for f, field in enumerate(encoder.schema.fields)
    }
    return {"fields": values, "label": {task: float(label[i]) for task, label in batch.label.items()}}


def _raw(encoder: Encoder, field: Field, index: int, value: Tensor | None) -> str:
    if index == NULL_ID:
        return "missing"
    if field.numeric:
        return f"{float(value):g} after scaling" if value is not None else f"id {index}"
    if field.name in encoder.config.planted:
        return f"id {index}"
    if field.name not in encoder.config.categorical:
        return f"bin {index}"
    if index == UNKNOWN_ID:
        return "unknown"
    lookup = encoder.lookup(field.name)
    return str(lookup.values[index - FIRST_ID]) if isinstance(lookup, Vocabulary) else f"bucket {index - FIRST_ID}"


def _from_all_ranks(own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    line = np.frombuffer((json.dumps(own) + "\n").encode(), np.uint8)
    together = gather_rows(torch.from_numpy(line.copy()).to(device)).cpu().numpy().tobytes()
    return [json.loads(text) for text in together.decode().splitlines()]


def _what(parts: list[dict[str, Any]]) -> str:
    losses = [loss for part in parts for loss in part["losses"] if not math.isfinite(float(loss))]
    bad = [g for part in parts for g in part["gradients"] if g["not_finite"]]
    if losses:
        return f"the loss is {losses[0]}" + ("" if bad else ", although every gradient is finite")
    if bad:
        return "a gradient is not finite, although the loss is"
    return "loss and gradients are finite, but the norm of the gradient is beyond the range of float32"


def _details(run: Run, facts: Mapping[str, Any], parts: list[dict[str, Any]], skipped: Sequence[int]) -> list[str]:
    rows = sum(len(part["rows"]) for part in parts)
    spent = f" after {len(skipped)} steps were skipped (train.skip_budget)" if skipped else ""
    lines = [f"  training stopped{spent}; the update was not made"]
    for part in parts:
        rank = f" of process {part['rank']}" if len(parts) > 1 else ""
        count = f"{part['suspicious_rows']:,} of {len(part['rows']):,} rows{rank} have " * bool(part["suspicious_rows"])
        lines.append(f"  {count}{part['suspicion']}{rank if not count else ''}:")
        lines += [f"    row {_row(suspect)}" for suspect in part["suspects"][:WORST]]
    lines += _gradients(parts)
    broken = [f"{name} ({count:,} entries)" for name, count in facts["parameters"].items()]
    if broken:
        lines.append(f"  weights that were not finite before the step: {', '.join(broken[:WORST])}")
    lines.append(f"  all {rows:,} rows of the step, more fields and parameters: {run.stage_folder / REPORT}")
    lines.append(
        "what may help: a lower train.learning_rate, a smaller train.clip_norm, `recsys check` and data.json for the "
        "rows above, or train.non_finite=skip; to go on from the last checkpoint with a change:\n"
        f"recsys train --resume {run.folder} --allow-drift train.learning_rate={run.train.learning_rate / 10:g}"
    )
    return lines


def _row(suspect: Mapping[str, Any]) -> str:
    fields = [f"{name}={value}" for name, value in suspect["fields"].items()]
    more = f", … ({len(fields) - FIELDS} more)" if len(fields) > FIELDS else ""
    labels = ", ".join(f"{task}={value:g}" for task, value in suspect["label"].items())
    number = f"{suspect['row']:,}" if suspect["row"] else "of unknown number"
    return f"{number}: {', '.join(fields[:FIELDS])}{more}; {labels}"


def _gradients(parts: list[dict[str, Any]]) -> list[str]:
    worst: dict[str, dict[str, Any]] = {}
    for g in (g for part in parts for g in part["gradients"]):
        known = worst.setdefault(g["parameter"], g)
        if (g["not_finite"], g["largest"]) > (known["not_finite"], known["largest"]):
            worst[g["parameter"]] = g
    order = sorted(worst.values(), key=lambda g: (-g["not_finite"], -g["largest"]))
    bad = [g for g in order if g["not_finite"]]
    if not bad:
        largest = ", ".join(f"{g['parameter']} {g['largest']:.3g}" for g in order[:WORST])
        return [f"  all gradients are finite; the largest entries: {largest}"]
    listed = "; ".join(f"{g['parameter']} {g['not_finite']:,} of {g['entries']:,}" for g in bad[:WORST])
    return [f"  gradients with entries that are not finite, in {len(bad)} of {len(order)} parameters: {listed}"]
