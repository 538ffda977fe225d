"""Training with sampled rows: to the same bits after a stop, alike in two processes, and choices by score."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from recsys.contracts import Batch
from recsys.data.sampling import Sampling
from recsys.train.sampled import choose_sampled, pairs

RECIPE = (
    "train",
    "quickstart",
    "data.source.rows=3000",
    "loss=bpr",
    "sampling={item: item, fields: [category, brand], user: user, negatives: 2, positives: exclude, rows: positives}",
    "model.interaction[1].dropout=0",
    "train.epochs=2",
    "train.batch_size=150",
    "train.patience=0",
    "train.accelerator=cpu",
    "train.threads=1",
    "train.monitor=auc",
)
SAMPLERS = ("uniform", "{use: popularity, power: 0.5}", "in_batch", "{use: dns, candidates: 3, temperature: 0.5}")


def recsys(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recsys.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "1-fit" / "model.safetensors")


def stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Train whole, and stopped in the midst of the second epoch: the weights must be the same bits."""
    from recsys.cli import app
    from recsys.train import checkpoint, epochs

    arguments = [*RECIPE, *overrides, "train.save_every=2"]
    app([*arguments, "--out", str(tmp_path / "whole")], standalone_mode=False)
    saved = 0

    def stop(*given: Any) -> Path:
        nonlocal saved
        saved += 1
        path = checkpoint.save_checkpoint(*given)
        if saved == 3:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", stop)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            app([*arguments, "--out", str(tmp_path / "broken")], standalone_mode=False)
    assert not (tmp_path / "broken" / "metrics.json").exists()
    app(["train", "--resume", str(tmp_path / "broken")], standalone_mode=False)
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("sampler", ["in_batch", "{use: dns, candidates: 3, temperature: 0.5}"])
def test_a_stop_changes_nothing(tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_and_resumed(tmp_path, monkeypatch, f"sampling.sampler={sampler}")


OWN = (  # losses with weights or a state of their own
    "{use: nbpo, dim: 4, l2: 0.001}",
    "{use: cet, dim: 4, tau: 2.0}",
    "{use: sampled_softmax, frequency: streaming}",
)


@pytest.mark.parametrize("loss", OWN)
def test_what_a_loss_learns_survives_a_stop(tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_and_resumed(tmp_path, monkeypatch, f"loss={loss}")


@pytest.mark.ddp
@pytest.mark.parametrize("loss", [OWN[0], pytest.param(OWN[1], marks=pytest.mark.slow)])
def test_losses_with_weights_of_their_own_learn_alike_in_two_processes(tmp_path: Path, loss: str) -> None:
    alike(tmp_path, ("two", "train.devices=2"), overrides=(f"loss={loss}",))


@pytest.mark.ddp
@pytest.mark.parametrize(
    "sampler", [SAMPLERS[2], *(pytest.param(other, marks=pytest.mark.slow) for other in SAMPLERS[3:])]
)
def test_two_processes_and_micro_batches_train_as_one(tmp_path: Path, sampler: str) -> None:
    changes = (("parts", "train.accumulate=3"), ("two", "train.devices=2"))
    alike(tmp_path, *changes, overrides=(f"sampling.sampler={sampler}",))


def alike(tmp_path: Path, *changes: tuple[str, str], overrides: tuple[str, ...]) -> None:
    """Train with each change and without: weights and losses must be the same but for rounding."""
    common = (*RECIPE, *overrides, "train.optimizer=sgd", "train.learning_rate=0.5")
    recsys(*common, "--out", tmp_path / "one")
    one = weights(tmp_path / "one")
    for name, change in changes:
        recsys(*common, change, "--out", tmp_path / name)
        other = weights(tmp_path / name)
        assert max(float((tensor - other[key]).abs().max()) for key, tensor in one.items()) < 2e-6, name
        history = [json.loads((tmp_path / n / "1-fit" / "history.json").read_text())["epochs"] for n in ("one", name)]
        for alone, together in zip(*history, strict=True):
            assert together["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-6)


class Scorer(torch.nn.Module):
    """The logit is the id of the first field; in training it would be something else."""

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"label": batch.ids[:, 0].float() * (-1.0 if self.training else 1.0)}


class Highest:
    candidates = 3

    def draw(self, draws: Any, count: int) -> Any: ...

    def log_q(self) -> Any: ...

    def choose(self, scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return (scores + uniform).argmax(2)


def chosen(scores: Sequence[Sequence[float]], noise: Sequence[float], negatives: int) -> Batch:
    n = len(scores)
    flat = torch.tensor([[0.0]] * n + [[x] for row in scores for x in row]).long()
    context = {
        "draw": torch.tensor([0.0] * n + list(noise)),
        "positive": torch.tensor([-1] * n + [k for k in range(n) for _ in range(3 * negatives)]),
    }
    batch = Batch(flat, label={"label": torch.zeros(len(flat))}, context=context, negatives=3 * negatives)
    options = cast(Any, SimpleNamespace(negatives=negatives))
    model = Scorer().train()
    found = choose_sampled(cast(Any, model), Sampling(options, cast(Any, None), Highest()), batch)
    assert model.training
    return found


def test_the_choice_keeps_one_candidate_of_each_sampled_row() -> None:
    scores = [[1, 5, 3, 9, 2, 4], [7, 6, 8, 0, 1, 0]]
    found = chosen(scores, [0.0] * 12, negatives=2)
    assert found.ids[:, 0].tolist() == [0, 0, 5, 9, 8, 1]
    assert found.negatives == 2
    assert found.context["positive"].tolist() == [-1, -1, 0, 0, 1, 1]
    assert "draw" not in found.context
    logged, sampled = pairs(found.ids[:, 0], found)
    assert logged.tolist() == [0, 0]
    assert sampled.tolist() == [[5, 9], [8, 1]]
    assert chosen([[1, 1, 1]], [0.1, 0.3, 0.2], 1).context["positive"].tolist() == [-1, 0]


def test_a_loss_of_pairs_needs_the_block(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recsys.cli", "train", "quickstart", "loss=bpr", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "loss: 'bpr' compares logged rows with sampled ones; add the block `sampling:`" in done.stderr
