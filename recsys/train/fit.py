"""The fit stage: epochs of training, with the best epoch chosen on the validation split."""

from __future__ import annotations

from recsys.errors import RecipeError
from recsys.train.run import Run


class Fit:
    """Train for some epochs and keep the weights of the best one.

    The best epoch is the one with the best `train.monitor` on the validation split; without a validation
    split it is the last. After every `train.plateau_patience` epochs in a row that are not better, the learning
    rate is multiplied by `train.plateau_factor`; `patience` such epochs in a row end the stage.

    Args:
        name: name of the stage, for its folder and for `rewind`.
        epochs: most epochs; by default `train.epochs`.
        learning_rate: by default `train.learning_rate`.
        patience: by default `train.patience`; 0 never stops early.
        snapshot_epoch: also keep the weights after this many epochs (0: the initial ones) for `rewind`; the
            stage does not stop before.
    """

    def __init__(
        self,
        *,
        name: str = "fit",
        epochs: int | None = None,
        learning_rate: float | None = None,
        patience: int | None = None,
        snapshot_epoch: int | None = None,
    ) -> None:
        self.name = name
        self.snapshot_epoch = snapshot_epoch
        changed = {"epochs": epochs, "learning_rate": learning_rate, "patience": patience}
        self._changed = {key: value for key, value in changed.items() if value is not None}

    def run(self, run: Run) -> None:
        """Fit `run.model`; its weights are the best epoch's afterwards."""
        options = run.train.model_copy(update=self._changed)
        if (self.snapshot_epoch or 0) > options.epochs:
            raise RecipeError(f"{run.stage}: snapshot_epoch is {self.snapshot_epoch}, but epochs is {options.epochs}")
        # Lightning takes seconds to import, and commands that train nothing know this stage too.
        from recsys.train.fitting import fit

        fit(run, self.name, options, self.snapshot_epoch)
