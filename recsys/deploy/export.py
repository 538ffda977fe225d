"""The stage `export`: the trained model with all that is needed to use it, and the bundle that serves it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.markup import escape

from recsys.contracts import Named
from recsys.data.encode import Encoder
from recsys.deploy.calibration import Calibration
from recsys.errors import RecipeError, RecsysError
from recsys.nn.layout import Layout
from recsys.nn.model import Model
from recsys.nn.reorder import Orders, renumbered
from recsys.nn.selection import save_selection
from recsys.train.checkpoint import read_json, replacing, save_tensors, sha256, write_json
from recsys.train.evaluate import plain
from recsys.train.run import Run, spec_name

BUNDLE = "bundle"
"""The bundle's folder in a run."""
CURVES = "calibration.json"
"""In a run's folder: what its stage `calibrate` found."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")
_SAMPLE = 65_536
"""Training rows that tell what the columns look like."""


class Export:
    """Write the trained model with all that is needed to use it, and a bundle that needs no torch to be served.

    The folder `export` holds weights, encoder, schema, recipe and hashes, for `recsys predict`; the folder `bundle` an
    ONNX graph with encoder, golden rows and hashes, for everything else. Where rows were pruned, the values of each
    vocabulary are numbered anew, those kept first: what is exported needs no map from ids to rows, and gives the same
    scores for the same raw values. Hashed fields keep their map.

    Args:
        exporters: further formats to write, each into its own folder: names of exporters, or `{use: NAME, …}`.
        bundle: whether to write the bundle; by default where it can be written, with a warning where it cannot. Where
            it is asked for, that is an error.
        aot: add the graph as native code to the bundle (`aot/model.pt2`), by AOTInductor for this kind of machine. It
            needs a C++ compiler here; the manifest marks it as executable, and only `recsys.deploy.aot.load` with
            `allow_executable=True` ever runs it, where torch is.
    """

    name = "export"

    def __init__(
        self,
        *,
        exporters: tuple[Annotated[str | dict[str, Any], Named("exporter")], ...] = (),
        bundle: bool | None = None,
        aot: bool = False,
    ) -> None:
        if aot and bundle is False:
            raise RecipeError("aot: native code is a part of the bundle, and `bundle: false` leaves that out")
        self.exporters = exporters
        self.bundle = True if aot else bundle
        self.aot = aot

    def run(self, run: Run) -> None:
        """Write the folders `export` and `bundle` of the run.

        Raises:
            RecipeError: a bundle is asked for, and cannot be written.
        """
        if not run.world.leads:
            return
        final = run.folder / "export"
        with replacing(final) as folder:
            folder.mkdir()
            encoder, model = self._write(run, folder)
        run.say(f"{run.stage}: {final}")
        if self.bundle is not False:
            self._bundle(run, encoder, model)

    def _bundle(self, run: Run, encoder: Encoder, model: Model) -> None:
        final = run.folder / BUNDLE
        try:
            missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
            if missing:
                raise RecipeError(f"{', '.join(missing)} not installed: pip install 'recsys[export]'")
            from recsys.deploy.write import write_bundle

            rows = np.linspace(0, len(run.split("train")) - 1, min(_SAMPLE, len(run.split("train")))).astype(np.int64)
            with replacing(final) as folder:
                folder.mkdir()
                sample = run.split("train").gather(rows)
                gap = write_bundle(folder, encoder, model, sample, _facts(run), _calibration(run), compiled=self.aot)
        except RecsysError as error:
            if self.bundle:
                raise RecipeError(f"{run.stage}: bundle: {error}") from error
            run.say(f"[yellow]warning: {run.stage} wrote no bundle: [/yellow]{escape(str(error))}")
            return
        run.say(f"{run.stage}: {final} (golden rows agree within {gap:.1g})")

    def _write(self, run: Run, folder: Path) -> tuple[Encoder, Model]:
        """Write the folder `export`; return the encoder and the model that are in it."""
        encoder, model = run.encoder, run.model
        example = run.split("train").gather(np.arange(min(8, len(run.split("train")))))
        orders = _orders(run)
        moved = None if orders is None else model.reordered(orders)
        # Where few ids are gone, zeros for the missing and the unknown value may take more than a map.
        if orders is None or moved is None or moved[0].bytes() >= model.bytes():
            for index, name in enumerate(run.state["selections"]):
                (folder / f"selection-{index}.safetensors").write_bytes((run.folder / name).read_bytes())
        else:
            layout, names = Layout.of(run.schema), encoder.vocabularies()
            new = {names[o]: order.numpy() for o, order in zip(layout.owners, orders, strict=True) if order is not None}
            encoder, example = encoder.reordered(new), renumbered(example, layout, orders)
            model, selection = moved
            save_selection(selection, folder / "selection-0.safetensors")
            run.say(f"{run.stage}: kept values first: {run.model.bytes():,} → {model.bytes():,} bytes")
        encoder.save(folder / "encoder")
        save_tensors(folder / "model.safetensors", model.state_dict())
        write_json(folder / "recipe.json", run.recipe)
        selections = sorted((p.name for p in folder.glob("selection-*")), key=lambda name: (len(name), name))
        shape = {"selections": selections, "scale": run.state["scale"], "stored": run.state["stored"]}
        write_json(folder / "model.json", shape)
        write_json(folder / "metrics.json", {split: plain(scores) for split, scores in run.scores.items()})
        for spec in self.exporters:
            (folder / spec_name(spec)).mkdir(parents=True, exist_ok=True)
            run.exporter(spec).export(model, example.to(run.device), folder / spec_name(spec))
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
        write_json(folder / "manifest.json", {str(path.relative_to(folder)): sha256(path) for path in files})
        return encoder, model


def _orders(run: Run) -> Orders | None:
    """The order of ids that the model wants, of the vocabularies that can be numbered anew; None if none shall be."""
    orders, known = run.model.row_order(), run.encoder.vocabularies()
    if orders is None:
        return None
    owners = Layout.of(run.schema).owners
    free = tuple(order if owner in known else None for owner, order in zip(owners, orders, strict=True))
    return free if any(order is not None for order in free) else None


def _calibration(run: Run) -> Calibration | None:
    """How logits become probabilities, where the run has found out."""
    path = run.folder / CURVES
    return Calibration.of_json(read_json(path), run.schema.tasks) if path.is_file() else None


def _facts(run: Run) -> Any:
    """What the bundle tells of the run, as far as it is known."""
    from recsys.deploy.write import Facts

    path = run.folder / "run.json"
    about: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    metrics = {split: plain(scores) for split, scores in run.scores.items()}
    return Facts(run.recipe, metrics, about.get("plugins", {}), str(about.get("data") or ""))
