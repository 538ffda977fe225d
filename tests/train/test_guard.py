"""What is not finite never reaches the weights: planted rows whose loss or gradient is NaN or infinite."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from recsys.data.batches import TrainBatches
from recsys.data.order import Order
from recsys.data.prepare import prepare
from recsys.errors import NonFiniteError
from recsys.nn import optim
from recsys.nn.optim import build_optimizer
from recsys.plugin.registry import load_registry
from recsys.recipe.build import build_run, build_source, data_root
from recsys.recipe.check import find_recipe, load_recipe
from recsys.recipe.execute import run_stages
from recsys.train import fitting
from recsys.train.checkpoint import load_checkpoint
from recsys.train.diagnose import rows_of
from recsys.train.distributed import World
from recsys.train.guard import Buffers, RandomState, StepGuard
from recsys.train.losses import BCE
from recsys.train.run import Run

PLUGIN = '''
from __future__ import annotations
from typing import Literal
import torch
from torch import Tensor
from recsys.api import Batch, Component, hookimpl
from recsys.train.losses import BCE

class Planted(BCE):
    """Binary cross-entropy; a row whose ids have one of the keys breaks it."""

    def __init__(self, tasks, *, keys: tuple[int, ...] = (), how: Literal["nan", "gradient", "loss"] = "nan") -> None:
        super().__init__(tasks)
        self.keys, self.how = torch.tensor(keys, dtype=torch.int64), how

    def forward(self, logits, batch: Batch) -> Tensor:
        loss = super().forward(logits, batch)
        hit = torch.isin((batch.ids * 31 ** torch.arange(batch.ids.shape[1])).sum(1), self.keys)
        z = logits[self.tasks[0]][hit]
        if not len(z):
            return loss
        if self.how == "nan":
            return loss + (z * torch.nan).sum()
        if self.how == "gradient":
            return loss + (z - z.detach()).sqrt().sum()  # 0, with an infinite derivative
        return loss + torch.inf

@hookimpl
def recsys_components():
    return [Component("loss", "planted", Planted)]
'''

BASE = (
    "data.source.rows=4000",
    "train.batch_size=512",
    "train.epochs=1",
    "train.patience=0",
    "stages=[{use: fit}]",
    "model.interaction[1].batch_norm=true",
    "model.interaction[1].dropout=0.3",
)
STEPS = 7
"""Of an epoch of 3,200 rows in steps of 512, the last one of 128."""


class Bench:
    """Runs of the quickstart with a loss that breaks at chosen rows."""

    def __init__(self, folder: Path) -> None:
        self.plugin = folder / "planted_plugin.py"
        self.plugin.write_text(PLUGIN)
        self.folder = folder
        self._runs = 0

    def start(self, *overrides: str, keys: Sequence[int] = (), how: str = "nan") -> tuple[Run, Callable[[], None]]:
        registry = load_registry(files=[self.plugin])
        loss = f"loss={{use: planted, keys: {[*keys]}, how: {how}}}"
        recipe = load_recipe(find_recipe("quickstart"), registry, [*BASE, loss, *overrides])
        source = build_source(recipe, registry, data_root(recipe, None))
        prepared = prepare(recipe.data, source, self.folder / "cache")
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        folder.mkdir()
        console = Console(file=io.StringIO(), width=1000)
        run = build_run(recipe, registry, folder, prepared.encoder, prepared.splits, world=World(), console=console)
        return run, lambda: run_stages(run, recipe, registry)

    def batches(self, run: Run) -> TrainBatches:
        return TrainBatches(
            run.split("train"), run.train.batch_size, run.seed("1-fit", "order"), accumulate=run.train.accumulate
        )

    def row(self, run: Run, epoch: int, step: int, at: int = 3) -> int:
        """Return a row of that step, from 0, with ids that no other row has."""
        batches = self.batches(run)
        order = Order(len(batches.shards), batches.seed, epoch)
        all_keys = self.keys(run, range(len(batches.shards)))
        rows = order.rows(np.arange(step * batches.batch_size + at, step * batches.batch_size + at + 100))
        return next(int(row) for row in rows if all_keys.count(all_keys[row]) == 1)

    def keys(self, run: Run, rows: Sequence[int]) -> list[int]:
        ids = run.split("train").gather(np.asarray(rows)).ids
        return [sum(int(x) * 31**f for f, x in enumerate(row)) for row in ids.tolist()]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("guard"))


def plain_loop(
    run: Run, batches: TrainBatches, skip: set[tuple[int, int]], epochs: int = 1, steps: int = STEPS
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train without any guard, leaving out whole steps; only the random numbers of their forward passes are drawn."""
    torch.manual_seed(run.seed("1-fit", "dropout", 0) % 2**32)
    model, options, loss = run.model.train(), run.train, BCE(run.schema.tasks)
    optimizer = build_optimizer(
        model.parameter_groups(),
        name=options.optimizer,
        lr=options.learning_rate,
        embedding_l2=options.embedding_l2,
        network_l2=options.network_l2,
    )
    for epoch in range(epochs):
        for i, batch in enumerate(batches.epoch(epoch)):
            step, micro = divmod(i, batches.accumulate)
            if epoch == epochs - 1 and step == steps:
                break
            if (epoch, step) in skip:
                copy.deepcopy(model)(batch)
                continue
            if micro == 0:
                optimizer.zero_grad()
            (loss(model(batch), batch) * batch.share / batches.accumulate).backward()
            if micro == batches.accumulate - 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
                optimizer.step()
    return model, optimizer


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adagrad"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_is_a_step_that_never_happened(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, optimizer: str, fused: bool
) -> None:
    """Weights, statistics of batch norm, moments and step counts, bit for bit."""
    monkeypatch.setattr(optim, "_can_fuse", lambda *_: fused)
    update = (f"train.optimizer={optimizer}", "train.network_l2=0.01", "train.non_finite=skip")
    probe, _ = bench.start(*update)
    bad = [bench.row(probe, 0, step) for step in (0, 3)]
    run, train = bench.start(*update, keys=bench.keys(probe, bad))
    train()
    model, reference = plain_loop(probe, bench.batches(probe), {(0, 0), (0, 3)})
    found = load_checkpoint(run.folder / "1-fit" / "checkpoints")
    assert found is not None
    tensors, state = found
    assert_same({n.removeprefix("model."): t for n, t in tensors.items() if n[:6] == "model."}, model.state_dict())
    wanted = {f"optimizer.{i}.{k}": t for i, s in reference.state_dict()["state"].items() for k, t in s.items()}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    assert_same({n: t for n, t in tensors.items() if n.startswith("optimizer.")}, wanted)
    assert state["skipped"] == [0, 3]
    if optimizer != "sgd":
        assert {float(t) for name, t in wanted.items() if name.endswith(".step")} == {STEPS - 2.0}
    # The reference would differ if a skipped step had been taken.
    other, _ = bench.start(*update)
    taken, _ = plain_loop(other, bench.batches(other), {(0, 0)})
    assert not torch.equal(taken.state_dict()["embedding.weight"], model.state_dict()["embedding.weight"])


@pytest.mark.parametrize("micro", [0, 1])
def test_one_bad_micro_batch_skips_the_whole_step(bench: Bench, micro: int) -> None:
    update = ("train.accumulate=2", "train.non_finite=skip", "train.epochs=2", "train.plateau_factor=1")
    probe, _ = bench.start(*update)
    bad = bench.row(probe, 0, 2, at=3 + 256 * micro)
    again = next(
        step
        for step in range(STEPS)
        if bad in Order(3200, bench.batches(probe).seed, 1).rows(np.arange(step * 512, min(step * 512 + 512, 3200)))
    )
    run, train = bench.start(*update, keys=bench.keys(probe, [bad]))
    train()
    model, _ = plain_loop(probe, bench.batches(probe), {(0, 2), (1, again)}, epochs=2)
    found = load_checkpoint(run.folder / "1-fit" / "checkpoints")
    assert found is not None
    assert_same({n.removeprefix("model."): t for n, t in found[0].items() if n[:6] == "model."}, model.state_dict())
    history = json.loads((run.folder / "1-fit" / "history.json").read_text())
    assert [epoch["train/skipped_steps"] for epoch in history["epochs"]] == [1, 1]
    assert history["skipped"] == [{"epoch": 1, "step": 3}, {"epoch": 2, "step": again + 1}]


def test_the_mean_loss_of_an_epoch_leaves_skipped_steps_out(bench: Bench) -> None:
    """With a learning rate of nearly nothing the mean over the other steps can be computed from the initial weights."""
    update = ("train.learning_rate=1e-12", "train.non_finite=skip", "model.interaction[1].dropout=0")
    probe, _ = bench.start(*update)
    run, train = bench.start(*update, keys=bench.keys(probe, [bench.row(probe, 0, 4)]))
    train()
    loss = BCE(probe.schema.tasks)
    model = probe.model.train()
    batches = list(bench.batches(probe).epoch(0))
    wanted = [float(loss(model(batch), batch).detach()) for i, batch in enumerate(batches) if i != 4]
    history = json.loads((run.folder / "1-fit" / "history.json").read_text())["epochs"]
    assert history[0]["train/loss"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "the loss is nan"),
        ("gradient", "a gradient is not finite, although the loss is"),
        ("loss", "the loss is inf, although every gradient is finite"),
    ],
)
def test_training_stops_before_the_update_and_names_step_rows_and_parameters(bench: Bench, how: str, says: str) -> None:
    probe, _ = bench.start()
    bad = bench.row(probe, 0, 4)
    run, train = bench.start(keys=bench.keys(probe, [bad]), how=how)
    with pytest.raises(NonFiniteError) as stopped:
        train()
    told = str(stopped.value)
    assert told.startswith(f"1-fit: epoch 1, step 5 of 7: {says}\n")
    batches = bench.batches(probe)
    rows = Order(3200, batches.seed, 0).rows(np.arange(4 * 512, 5 * 512))
    report = json.loads((run.folder / "1-fit" / "non_finite.json").read_text())
    assert (report["epoch"], report["step"], report["parameters"]) == (1, 5, {})
    (part,) = report["ranks"]
    assert part["rows"] == (rows + 1).tolist()
    user = probe.split("train").gather(np.array([bad])).ids[0, 0]
    raw = "unknown" if user == 1 else probe.encoder.lookup("user").values[int(user) - 2]  # type: ignore[union-attr]
    if how == "loss":
        assert part["suspicious_rows"] == 0
        assert "all gradients are finite; the largest entries: " in told
    else:
        assert part["suspicious_rows"] == 1
        assert f"row {bad + 1:,}: user={raw}, item=" in told
        assert "1 of 512 rows have a gradient of the loss by the logit that is not finite" in told
        assert {g["parameter"]: g["not_finite"] for g in part["gradients"]}["head.bias"] == 1
        worst = part["gradients"][0]
        assert f": {worst['parameter']} {worst['not_finite']:,} of {worst['entries']:,}; " in told
    assert "train.learning_rate" in told
    # The model is as it was before the step: four steps were taken.
    model, _ = plain_loop(probe, batches, set(), steps=4)
    assert_same(run.model.state_dict(), model.state_dict())


def test_the_counts_are_those_of_the_gradient_itself(bench: Bench) -> None:
    probe, _ = bench.start()
    bad = bench.row(probe, 0, 2)
    run, train = bench.start(keys=bench.keys(probe, [bad]))
    with pytest.raises(NonFiniteError):
        train()
    (part,) = json.loads((run.folder / "1-fit" / "non_finite.json").read_text())["ranks"]
    model, _ = plain_loop(probe, bench.batches(probe), set(), steps=2)
    batch = list(bench.batches(probe).epoch(0))[2]
    model.zero_grad()
    run.loss(model(batch), batch).backward()  # the planted loss, with the random numbers that come next
    wanted = {n: int((~torch.isfinite(p.grad)).sum()) for n, p in model.named_parameters() if p.grad is not None}
    assert {g["parameter"]: g["not_finite"] for g in part["gradients"]} == wanted
    counts = [g["not_finite"] for g in part["gradients"]]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) > 0


def test_weights_that_are_broken_already_are_named(bench: Bench) -> None:
    run, train = bench.start()
    with torch.no_grad():
        run.model.get_parameter("head.bias").fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"weights that were not finite before the step: head.bias \(1 entries\)"):
        train()


def test_a_norm_beyond_float32_is_not_clipped_to_nothing(bench: Bench) -> None:
    """Clipping by an infinite norm would make every gradient zero, and training would go on without learning."""
    run, train = bench.start()
    run.loss.forward = lambda z, batch: 1e30 * next(iter(z.values())).square().mean()  # type: ignore[attr-defined]
    with torch.no_grad():
        run.model.get_parameter("head.bias").fill_(1.0)
    with pytest.raises(NonFiniteError, match="the norm of the gradient is beyond the range of float32"):
        train()


def test_one_more_than_the_budget_stops(bench: Bench) -> None:
    update = ("train.non_finite=skip", "train.skip_budget=2")
    probe, _ = bench.start(*update)
    keys = bench.keys(probe, [bench.row(probe, 0, step) for step in (1, 2, 5)])
    run, train = bench.start(*update, keys=keys)
    with pytest.raises(NonFiniteError, match=r"step 6 of 7.*\n.*after 2 steps were skipped \(train.skip_budget\)"):
        train()
    model, _ = plain_loop(probe, bench.batches(probe), {(0, 1), (0, 2)}, steps=5)
    assert_same(run.model.state_dict(), model.state_dict())
    log = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "epoch 1, step 2 of 7: the loss or a gradient is not finite; the step is skipped (1 of at most 2)" in log


@pytest.mark.parametrize("read_every", [2, 3, 100])
def test_flags_that_are_read_late_protect_the_weights_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, read_every: int
) -> None:
    """As on a GPU: the host goes on for some steps before it learns; at the latest at the end of the epoch."""
    monkeypatch.setattr(fitting, "StepGuard", functools.partial(StepGuard, read_every=read_every))
    update = ("train.non_finite=skip", "train.skip_budget=1")
    probe, _ = bench.start(*update)
    bad = [bench.row(probe, 0, step) for step in (0, 2)]
    run, train = bench.start(*update, keys=bench.keys(probe, bad))
    with pytest.raises(NonFiniteError, match="step 3 of 7: the loss is nan") as stopped:
        train()
    assert f"row {bad[1] + 1:,}: " in str(stopped.value)
    model, _ = plain_loop(probe, bench.batches(probe), {(0, 0)}, steps=2)
    assert_same(run.model.state_dict(), model.state_dict())
    assert not list((run.folder / "1-fit").glob("checkpoints/*")), "nothing is saved after the stop"


def never(step: int, random: RandomState) -> NoReturn:
    raise AssertionError(f"stopped in step {step}")


class Stopped(Exception):
    pass


@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=60),
    budget=st.integers(0, 4),
    read_every=st.integers(1, 7),
    save=st.sets(st.integers(0, 59), max_size=3),
)
def test_the_guard_against_its_definition(bad: list[bool], budget: int, read_every: int, save: set[int]) -> None:
    told: list[int] = []
    stops: list[int] = []

    def stop(step: int, random: RandomState) -> NoReturn:
        assert torch.equal(random.cpu, states[step])
        stops.append(step)
        raise Stopped

    guard = StepGuard(torch.device("cpu"), budget, told.append, stop, read_every=read_every)
    bad_steps = [step for step, flag in enumerate(bad) if flag]
    fatal = bad_steps[budget] if len(bad_steps) > budget else math.inf
    states: list[Tensor] = []
    with contextlib.suppress(Stopped):
        for step, flag in enumerate(bad):
            states.append(torch.get_rng_state())
            guard.begin(step)
            torch.rand(3)
            nothing, broken = torch.zeros(()), torch.tensor(torch.nan if step % 2 else torch.inf)
            norm, loss = (broken, nothing) if step % 3 else (nothing, broken)
            masked = guard.judge(step, norm if flag else nothing, loss if flag else nothing)
            assert bool(masked) == bool(guard.masked) == (flag or step > fatal)
            assert step - fatal <= 2 * read_every, "learned of it in time"
            guard.look(step)
            if step in save:
                guard.settle()
        guard.settle()
    assert stops == ([] if fatal == math.inf else [fatal])
    assert told == guard.skipped == bad_steps[:budget]


def test_a_resumed_guard_goes_on_counting() -> None:
    told: list[int] = []
    guard = StepGuard(torch.device("cpu"), 3, told.append, never, skipped=[1, 8])
    for step in range(10, 13):
        guard.begin(step)
        guard.judge(step, torch.tensor(torch.inf if step == 11 else 1.0), torch.zeros(()))
        guard.look(step)
    assert guard.skipped == [1, 8, 11]
    assert told == [11]


def test_no_step_asks_the_device() -> None:
    """Fake tensors have no values: whatever would wait for one raises. Only reading, every so often, may."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        guard = StepGuard(torch.device("cpu"), 2, lambda step: None, never, read_every=50)
        buffers = Buffers(model)
        fused = torch.optim.Adam(model.parameters(), fused=True)
        fused.found_inf = guard.masked  # type: ignore[attr-defined]
        for step in range(1, 49):
            guard.begin(step)
            buffers.remember()
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            masked = guard.judge(step, norm, loss.detach())
            buffers.restore_where(masked)
            guard.look(step)
            fused.step()
        with pytest.raises(DataDependentOutputException):
            bool(masked)


class Restless(nn.Module):
    """Changes a buffer in place, replaces one, and leaves one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("table", torch.arange(5), persistent=False)

    def forward(self) -> None:
        self.count += 1
        self.mean = self.mean * 0.5 + 1


def test_buffers_go_back_only_when_told_to() -> None:
    module = Restless()
    buffers = Buffers(module)

    def step(masked: bool) -> tuple[int, float]:
        buffers.remember()
        module()
        buffers.restore_where(torch.tensor(masked))
        return int(module.count), float(module.mean[0])

    assert [step(m) for m in (False, True, True, False)] == [(1, 1.0), (1, 1.0), (1, 1.0), (2, 1.5)]
    module.count.fill_(7)  # by someone else, between the steps
    assert step(True) == (7, 1.5)
    assert module.table.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("memory", [0, 512, 0.02])
def test_the_rows_of_a_step_are_those_it_was_given(bench: Bench, memory: float) -> None:
    """In one order over all rows, and in windows."""
    run, _ = bench.start()
    shards = run.split("train")
    batches = TrainBatches(shards, 512, seed=3, rank=1, ranks=2, accumulate=2, shuffle_memory=memory)
    given = list(batches.epoch(4))[6:8]
    rows = rows_of(batches, 4, 3, given)
    assert len(rows) == 256
    assert torch.equal(shards.gather(rows).ids, torch.cat([batch.ids for batch in given]))
    assert (rows_of(batches, 4, 3, given[::-1]) == -1).all(), "rather no numbers than wrong ones"


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_a_stage_may_be_skipped_through_and_says_so(bench: Bench) -> None:
    """Every step of an epoch is bad: there is no mean loss, and the weights are the initial ones."""
    probe, _ = bench.start()
    keys = bench.keys(probe, [bench.row(probe, 0, step) for step in range(STEPS)])
    run, train = bench.start("train.non_finite=skip", keys=keys)
    train()
    assert_same(run.model.state_dict(), probe.model.state_dict())
    history: Any = json.loads((run.folder / "1-fit" / "history.json").read_text())["epochs"]
    assert history[0]["train/loss"] is None
    assert history[0]["train/skipped_steps"] == STEPS
