"""The `train:` block of a recipe: the defaults of every fit stage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainOptions(BaseModel):
    """How to fit. Every fit stage takes these, and may change some of them for itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epochs: int = Field(20, ge=1, description="most passes over the training rows")
    batch_size: int = Field(
        4096, ge=1, description="rows per optimizer step, over all devices and micro-batches together"
    )
    eval_batch_size: int = Field(16384, ge=1, description="rows per batch where nothing is learned")
    optimizer: Literal["adam", "adamw", "sgd", "adagrad"] = Field("adam", description="update rule")
    learning_rate: float = Field(1e-3, gt=0, description="step size at the start")
    embedding_l2: float = Field(0.0, ge=0, description="λ of (λ/2)·||E||² over the whole table, every step")
    network_l2: float = Field(0.0, ge=0, description="the same for all other weights")
    clip_norm: float = Field(10.0, ge=0, description="largest norm of the whole gradient; 0 does not clip")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="at a loss or gradient that is NaN or infinite: stop before the update, or skip the step"
    )
    skip_budget: int = Field(
        10, ge=1, description="steps of a stage that may be skipped with `non_finite: skip`; one more stops"
    )
    accumulate: int = Field(1, ge=1, description="micro-batches that a step is divided into, to save memory")
    shuffle_memory: float = Field(
        512,
        ge=0,
        description="MiB of encoded rows that each process holds to shuffle them; larger data is shuffled in windows "
        "that are read from disk; 0 shuffles all of it as one",
    )
    save_every: int = Field(
        1000, ge=0, description="steps between checkpoints within an epoch; 0 saves at the end of epochs only"
    )
    monitor: str = Field("auc", description="metric on the validation split that chooses the best epoch")
    patience: int = Field(
        2, ge=0, description="stop after so many epochs in a row without a better monitor; 0 never stops early"
    )
    plateau_factor: float = Field(
        0.1, gt=0, le=1, description="multiply the learning rate by this when epochs are not better; 1 keeps it"
    )
    plateau_patience: int = Field(
        1, ge=1, description="epochs in a row without a better monitor after which plateau_factor is applied"
    )
    min_delta: float = Field(1e-6, ge=0, description="least gain that counts as better")
    seed: int = Field(2024, ge=0, description="of initial weights, row order and dropout")
    devices: int = Field(1, ge=1, description="processes that train together, each on its own device")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="where to train")
    precision: Literal["32", "bf16"] = Field("32", description="of the forward and backward pass; weights stay float32")
    sync_batch_norm: bool = Field(False, description="batch statistics over all devices (GPU only)")
    threads: int = Field(0, ge=0, description="CPU threads of each process; 0 leaves the choice to torch")
    logger: Literal["csv", "tensorboard", "wandb", "mlflow"] = Field("csv", description="where curves are written")
