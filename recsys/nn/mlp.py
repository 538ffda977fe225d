"""The multilayer perceptron that models and plugins share."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from recsys.errors import DataError
from recsys.nn.dropout import Dropout

Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
"""A part of a whole that is dropped, in [0, 1)."""
Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh", "identity"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class MLPBlock(nn.Module):
    """Layers of linear → (batch norm) → activation → (dropout).

    h_{l+1} = dropout(φ(BN(W_l h_l + b_l))); weights start xavier-normal, biases at zero.

    Args:
        in_width: width of the input.
        hidden: width of each layer; with none of them, the block passes its input on.
        activation: φ.
        batch_norm: normalise before the activation. Training then needs at least two rows per batch.
        dropout: share of the activations that is dropped in training.
    """

    def __init__(
        self,
        in_width: int,
        hidden: tuple[int, ...],
        *,
        activation: Activation = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = hidden[-1] if hidden else in_width
        self.batch_norm = batch_norm and bool(hidden)
        layers: list[nn.Module] = []
        for width in hidden:
            layers.append(linear(in_width, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(_ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(Dropout(dropout))
            in_width = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_width] -> [B, width]`.

        Raises:
            DataError: training with batch normalisation on a single row, whose variance is not defined.
        """
        if self.training and self.batch_norm and x.shape[0] == 1:
            raise DataError(
                "batch normalisation cannot train on a batch of one row: "
                "use a batch size of at least 2, or switch batch_norm off"
            )
        y: Tensor = self.layers(x)
        return y


def linear(in_width: int, out_width: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with xavier-normal weight and zero bias."""
    layer = nn.Linear(in_width, out_width, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
