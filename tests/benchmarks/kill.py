"""SIGKILL training again and again, resume it, and compare all it leaves with a run that was left alone.

    python tests/benchmarks/kill.py --what fit|checkpoint|files|encode [--kills 50] [--seed 0] [--json]

`fit` kills at random times, in any stage; `checkpoint` kills at every call that saving a checkpoint makes of the
file system, and then at random ones; `files` kills at every renaming of a file or folder in a whole run; `encode`
kills at random times while the data is encoded. Exit status 0 means that every run went on to the same bytes in
every file, and that no saved checkpoint was lost.

SIGKILL ends a process, not the machine: what the system holds in memory still reaches the disk. A power cut, which
the flushing of files is for, is not tried here.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import safetensors.torch

from recsys import cli
from recsys.deploy import export
from recsys.recipe import execute
from recsys.train import checkpoint, epochs, fit, run, stages

RECIPE = (
    "quickstart",
    "data.source.rows=12000",
    "train.batch_size=128",
    "train.save_every=7",
    "train.patience=0",
    "model.interaction[1].batch_norm=true",
    "stages=[{use: fit, name: search, epochs: 2, snapshot_epoch: 1}, {use: rewind, to: search}, "
    "{use: fit, name: again, epochs: 2}, {use: prune}, {use: evaluate, metrics: [auc, logloss]}, {use: export}]",
)
ENCODE = ("quickstart", "data.source.rows=1000000", "train.epochs=1", "train.batch_size=8192")
PHASES: tuple[tuple[str, Any, str], ...] = (
    ("encode", execute, "prepare_data"),
    ("start the folder", execute, "write_run"),
    ("fit", fit.Fit, "run"),
    ("resume", epochs.Epochs, "resume"),
    ("checkpoint", epochs, "save_checkpoint"),
    ("score an epoch", epochs.Epochs, "_score"),
    ("snapshot", run.Run, "keep_snapshot"),
    ("weights", run.Run, "keep_weights"),
    ("rewind", stages.Rewind, "run"),
    ("prune", stages.Prune, "run"),
    ("evaluate", stages.Evaluate, "run"),
    ("export", export.Export, "run"),
    ("stage done", run.Run, "stage_done"),
    ("report", execute.Session, "_report"),
)
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync", "tensors", "half of the tensors")
WATCHED = frozenset(CALLS[:5])
"""Events of `sys.addaudithook`; the others are patched."""


class Board:
    """What a child tells its parent, readable after it was killed: named whole numbers in shared memory."""

    NAMES = ("phase", "call", "calls", "saves", "saved_stage", "saved_step", "first_step", "encoded")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * self.NAMES.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * self.NAMES.index(name), value)


def start(arguments: Sequence[object], board: Board, log: Path, aim: Callable[[Board], None] | None = None) -> int:
    """Run a command of recsys in a child of this process, which has imported everything; return its id."""
    for name in Board.NAMES:
        if not name.startswith("saved"):  # that of an earlier process of the run must still be there
            board[name] = 0
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["recsys", *map(str, arguments)]
        watch(board)
        if aim is not None:
            aim(board)
        cli.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(board: Board) -> None:
    """Let this process write down which phase it is in, what it has saved, and when it made its first step."""

    def marking(real: Callable[..., Any], number: int) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            before, board["phase"] = board["phase"], number
            result = real(*given, **more)
            if PHASES[number - 1][0] == "checkpoint":
                board["saved_stage"], board["saved_step"] = int(given[0].parent.name.split("-")[0]), given[1]
            if PHASES[number - 1][0] == "encode":
                board["encoded"] = time.monotonic_ns()
            board["phase"] = before
            return result

        return call

    for number, (_, owner, name) in enumerate(PHASES, 1):
        setattr(owner, name, marking(getattr(owner, name), number))
    real_end = epochs.Epochs.on_train_batch_end

    def first_step(*given: Any, **more: Any) -> None:
        board["first_step"] = board["first_step"] or time.monotonic_ns()
        real_end(*given, **more)

    epochs.Epochs.on_train_batch_end = first_step  # type: ignore[method-assign]


def aimed(save: int, n: int) -> Callable[[Board], None]:
    """Return what makes a process kill itself before the n-th call of its `save`-th checkpoint; 0 only counts."""

    def install(board: Board) -> None:
        real_save, real_fsync, real_tensors = epochs.save_checkpoint, os.fsync, checkpoint.save_file
        inside = False

        def count(call: str) -> bool:
            board["calls"] += 1
            board["call"] = CALLS.index(call) + 1
            return board["saves"] == save and board["calls"] == n

        def passed(call: str) -> None:
            if inside and count(call):
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(handle: int) -> None:
            passed("os.fsync")
            real_fsync(handle)

        def tensors(values: Any, path: Path) -> None:
            nonlocal inside
            passed("tensors")
            if inside and count("half of the tensors"):
                inside = False
                raw = safetensors.torch.save(values)
                path.write_bytes(raw[: len(raw) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            real_tensors(values, path)

        def saving(*given: Any) -> Any:
            nonlocal inside
            board["saves"] += 1
            board["calls"] = 0
            inside = True
            try:
                return real_save(*given)
            finally:
                inside = False

        sys.addaudithook(lambda event, _: passed(event) if event in WATCHED else None)
        os.fsync, checkpoint.save_file, epochs.save_checkpoint = fsync, tensors, saving

    return install


def aimed_at_renaming(n: int) -> Callable[[Board], None]:
    """Return what makes a process kill itself before it renames anything for the n-th time; 0 only counts."""

    def install(board: Board) -> None:
        def renaming(event: str, _: Any) -> None:
            if event == "os.rename":
                board["calls"] += 1
                board["call"] = CALLS.index(event) + 1
                if board["calls"] == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(renaming)

    return install


def left_by(folder: Path) -> dict[str, Any]:
    """Return what a finished run left: file → sha256, but for what tells of times, of which the rest is compared.

    A kill just after a stage's last save leaves one checkpoint more than usual, an older one; it is not compared.
    """
    spare = {old for place in folder.glob("*/checkpoints") for old in sorted(place.glob("step-*"))[: -checkpoint.KEEP]}
    found: dict[str, Any] = {
        str(path.relative_to(folder)): checkpoint.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent not in spare
    }
    found["run.json"] = checkpoint.read_json(folder / "run.json")["data"]
    found["metrics.json"] = checkpoint.read_json(folder / "metrics.json")["metrics"]
    state = checkpoint.read_json(folder / "state.json")
    found["state.json"] = {k: v for k, v in state.items() if k not in ("seconds_training", "rows_trained")}
    return found


def lost(folder: Path, board: Board) -> bool:
    """Whether the newest checkpoint on disk is broken or older than the last one of which the save had returned."""
    if not board["saved_stage"]:
        return False
    (place,) = folder.glob(f"{board['saved_stage']}-*/checkpoints")
    told: list[str] = []
    found = checkpoint.load_checkpoint(place, told.append)
    newest = max(int(path.name.removeprefix("step-")) for path in place.glob("step-*"))
    return found is None or bool(told) or newest < board["saved_step"]


@dataclass
class Killer:
    """Runs, kills, resumes and compares.

    Args:
        recipe: and overrides.
        place: an empty folder.
        rng: draws the times and the calls.
        counting: put into the run that is not killed.
    """

    recipe: Sequence[str]
    place: Path
    rng: random.Random
    counting: Callable[[Board], None]
    board: Board = field(default_factory=Board)
    phases: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    runs: int = 0
    equal: int = 0
    resumed: int = 0
    not_resumed: int = 0
    lost: int = 0
    overheads: list[float] = field(default_factory=list)

    def whole(self) -> tuple[float, float]:
        """Run without a kill; return its seconds and those until the data was encoded, imports not counted."""
        begun = time.monotonic_ns()
        pid = start(["train", *self.recipe, "--out", self.place / "whole"], self.board, self.log, self.counting)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"the run that is not killed fails:\n{self.log.read_text()}")
        self.expected = left_by(self.place / "whole")
        return (time.monotonic_ns() - begun) / 1e9, (self.board["encoded"] - begun) / 1e9

    @property
    def log(self) -> Path:
        """Where all the children write."""
        return self.place / "log"

    def once(self, folder: Path, delay: float | None, aim: Callable[[Board], None] | None = None) -> bool:
        """Start or resume a run, to be killed after `delay` seconds or where it aims; return whether it was killed."""
        resume = (folder / "run.json").exists()
        begun = time.monotonic_ns()
        pid = start(
            ["train", *(["--resume", folder] if resume else [*self.recipe, "--out", folder])],
            self.board,
            self.log,
            aim,
        )
        if delay is not None:
            while time.monotonic_ns() - begun < delay * 1e9 and not _ended(pid):
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if resume and self.board["first_step"]:
            self.overheads.append((self.board["first_step"] - begun) / 1e9)
        if os.WIFSIGNALED(status):
            self.kills += 1
            where = PHASES[self.board["phase"] - 1][0] if self.board["phase"] else "between"
            if PHASES[self.board["phase"] - 1][0] == "checkpoint" and aim is not None:
                where = f"checkpoint, before {CALLS[self.board['call'] - 1]}"
            self.phases[where] += 1
            self.lost += lost(folder, self.board)
            return True
        if status:
            self.not_resumed += 1
            raise SystemExit(f"a run that was killed does not go on:\n{self.log.read_text()[-3000:]}")
        self.resumed += self._pending
        return False

    _pending: int = 0

    def until_done(self, next_kill: Callable[[], tuple[float | None, Callable[[Board], None] | None] | None]) -> None:
        """Begin a run and kill it as told until it ends or no kill is wanted any more; compare what it leaves."""
        folder = self.place / "run"
        shutil.rmtree(folder, ignore_errors=True)
        self._pending = self.board["saved_stage"] = self.board["saved_step"] = 0
        while self.once(folder, *(next_kill() or (None, None))):
            self._pending += 1
        if not self._pending:
            return  # it was faster than the kill
        self.runs += 1
        found = left_by(folder)
        self.equal += found == self.expected
        for name in sorted({*found, *self.expected}):
            if found.get(name) != self.expected.get(name):
                print(f"differs: {name}", file=sys.stderr)

    def table(self, what: str) -> tuple[dict[str, Any], bool]:
        """Return what was found, and whether all is as it must be."""
        overheads = sorted(self.overheads)
        facts = {
            "what": what,
            "SIGKILLs": self.kills,
            "killed in": dict(self.phases.most_common()),
            "runs": self.runs,
            "kills after which the run went on": self.resumed,
            "runs with the same bytes in every file": self.equal,
            "lost checkpoints": self.lost,
            "seconds to the first new step, imports not counted, median": round(overheads[len(overheads) // 2], 2)
            if overheads
            else None,
            "the same, worst": round(overheads[-1], 2) if overheads else None,
        }
        return facts, bool(self.kills == self.resumed and self.runs == self.equal and not self.lost)


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_at_random(killer: Killer, kills: int, latest: float) -> None:
    """Kill at times from 0 to `latest` seconds."""
    while killer.kills < kills:
        killer.until_done(lambda: (killer.rng.uniform(0, latest), None) if killer.kills < kills else None)


def kill_in_saves(killer: Killer, kills: int) -> None:
    """Kill before every call of a save that removes an old checkpoint too, then before random ones."""
    calls = killer.board["calls"]
    kills = max(kills, calls)

    def next_kill() -> tuple[None, Callable[[Board], None]] | None:
        if killer.kills >= kills:
            return None
        n = killer.kills + 1 if killer.kills < calls else killer.rng.randint(1, calls)
        return None, aimed(killer.rng.randint(3, 6), n)

    while killer.kills < kills:
        killer.until_done(next_kill)


def kill_at_renamings(killer: Killer) -> None:
    """Kill a run before its first renaming, another before its second, and so on to the last."""
    for n in range(1, killer.board["calls"] + 1):
        killer.until_done(lambda n=n: (None, aimed_at_renaming(n)) if killer.kills < n else None)  # type: ignore[misc]


def kill_encoding(killer: Killer, kills: int, latest: float) -> bool:
    """Kill while encoding, up to five times for each data set; return whether the cache was clean in the end."""
    clean = True
    while killer.kills < kills:
        cache = killer.place / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        os.environ["RECSYS_CACHE"] = str(cache)
        stop = min(kills, killer.kills + 5)
        killer.until_done(
            lambda stop=stop: (killer.rng.uniform(0, latest), None) if killer.kills < stop else None  # type: ignore[misc]
        )
        clean &= len(list(cache.iterdir())) == 1
    return clean


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("fit", "checkpoint", "files", "encode"), default="fit")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the table as one line of JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECSYS_CACHE"] = f"{folder}/whole-cache"
        recipe = {"encode": ENCODE, "files": (*RECIPE, "train.save_every=0")}.get(given.what, RECIPE)
        counting = aimed_at_renaming(0) if given.what == "files" else aimed(0, 0)
        killer = Killer(recipe, Path(folder), random.Random(given.seed), counting)
        length, encoding = killer.whole()
        clean = True
        if given.what == "fit":
            kill_at_random(killer, given.kills, 0.6 * length)
        elif given.what == "checkpoint":
            kill_in_saves(killer, given.kills)
        elif given.what == "files":
            kill_at_renamings(killer)
        else:
            clean = kill_encoding(killer, given.kills, 0.7 * encoding)
        facts, right = killer.table(given.what)
        if given.what == "encode":
            facts["left half encoded in the cache"] = "nothing" if clean else "something"
    if given.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:62} {value}")
    sys.exit(0 if right and clean else 1)


if __name__ == "__main__":
    main()
