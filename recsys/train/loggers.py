"""Lightning's loggers by the name that a recipe gives them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recsys.errors import RecipeError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def make_logger(name: Literal["csv", "tensorboard", "wandb", "mlflow"], folder: Path, stage: str) -> Logger:
    """Return the logger `name`, writing the curves of a stage under the run's folder.

    Raises:
        RecipeError: the package that the logger needs is not installed, or has nowhere to write to.
    """
    from lightning.pytorch import loggers

    try:
        match name:
            case "csv":
                # Lightning would warn of the curves that a resumed stage is about to write again.
                shutil.rmtree(folder / stage / "curves", ignore_errors=True)
                return loggers.CSVLogger(folder / stage, name="curves", version="")
            case "tensorboard":
                return loggers.TensorBoardLogger(folder / stage, name="curves", version="")
            case "wandb":
                return loggers.WandbLogger(name=f"{folder.name}/{stage}", save_dir=folder / stage, project="recsys")
            case "mlflow":
                return _mlflow(f"{folder.name}/{stage}")
    except ModuleNotFoundError as error:
        package = error.name or name
        raise RecipeError(
            f"train.logger: '{name}' needs the package '{package}'; install it with `pip install \"recsys[{name}]\"`"
        ) from None


def _mlflow(run_name: str) -> Logger:
    from lightning.pytorch import loggers

    try:
        where = os.environ.get("MLFLOW_TRACKING_URI")  # which Lightning reads when it is imported, and no later
        return loggers.MLFlowLogger(experiment_name="recsys", run_name=run_name, tracking_uri=where)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # its own errors have names only where it is installed
        told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RecipeError(
            f"train.logger: mlflow: {told} The environment variable MLFLOW_TRACKING_URI says where curves go, such as "
            "the address of a server"
        ) from None
