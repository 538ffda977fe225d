"""FinalMLP: two perceptrons that see the fields through gates of their own, and a bilinear fusion."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from recsys.api import Component, Fields, MLPBlock, RecipeError, Share, hookimpl, linear


class FinalMLP(nn.Module):
    """Two perceptrons, each with gates on its input, fused by a bilinear form in blocks.

    x_s = 2 σ(MLP_s(c_s)) ∘ flatten(e),  h_s = MLP'_s(x_s),
    logit = w₁ᵀ h_1 + w₂ᵀ h_2 + Σ_k h_1⁽ᵏ⁾ᵀ W_k h_2⁽ᵏ⁾, h⁽ᵏ⁾ the k-th of `heads` equal parts; the head adds b.

    c_s are the embeddings of the stream's context fields, or one learned vector. The authors' code learns tables for
    the contexts alone; so does this with `context_dims`, in the last dimensions of the one table.

    Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", AAAI 2023, arXiv 2304.00902.

    Args:
        first: width of each layer of the first perceptron.
        second: width of each layer of the second perceptron.
        batch_norm: normalise before the perceptrons' activations; training then needs at least two rows per batch.
        dropout: share of the perceptrons' activations that is dropped in training.
        heads: number of blocks of the bilinear form; both last widths must be divisible by it.
        gates: gate the inputs; without, both perceptrons see the same.
        gate_hidden: width of each hidden layer of the gates.
        first_context: names of the fields that steer the first gate; none: a learned vector.
        second_context: names of the fields that steer the second gate; none: a learned vector.
        context_dims: so many of the embedding's dimensions, the last ones, are the contexts' alone, and the perceptrons
            read the others; 0: both read the whole embedding.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        first: tuple[PositiveInt, ...] = (64, 64, 64),
        second: tuple[PositiveInt, ...] = (64, 64, 64),
        batch_norm: bool = False,
        dropout: Share = 0.0,
        heads: PositiveInt = 1,
        gates: bool = True,
        gate_hidden: tuple[PositiveInt, ...] = (64,),
        first_context: tuple[str, ...] = (),
        second_context: tuple[str, ...] = (),
        context_dims: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        if context_dims >= fields.dim:
            raise RecipeError(
                f"context_dims is {context_dims} of {fields.dim} dimensions: none is left to the perceptrons"
            )
        if context_dims and not gates:
            raise RecipeError("context_dims are dimensions for the gates, which are off")
        self.context_dims = context_dims
        width = len(fields) * (fields.dim - context_dims)
        contexts = (first_context, second_context) if gates else ()
        steering = Fields(fields.names, fields.rows, context_dims or fields.dim)
        self.gates = nn.ModuleList(Gate(steering, context, gate_hidden, width) for context in contexts)
        stacks = [MLPBlock(width, hidden, batch_norm=batch_norm, dropout=dropout) for hidden in (first, second)]
        self.stacks = nn.ModuleList(stacks)
        widths = [stack.width for stack in stacks]
        if any(w % heads for w in widths):
            raise RecipeError(f"the last widths {widths[0]} and {widths[1]} cannot both be split into {heads} heads")
        self.linears = nn.ModuleList(linear(w, 1, bias=False) for w in widths)
        self.weight = nn.Parameter(torch.empty(heads, widths[0] // heads, widths[1] // heads))  # W_k
        nn.init.normal_(self.weight, std=(2.0 / (self.weight.numel() + 1)) ** 0.5)
        self.width = 1
        self.is_logit = True

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, 1]`."""
        inputs, contexts = self._split(e)
        x = inputs.flatten(1)  # [B, F·D]
        seen = [x * gate(contexts) for gate in self.gates] or [x, x]
        one, two = (stack(s) for stack, s in zip(self.stacks, seen, strict=True))  # [B, H_1], [B, H_2]
        first_order = self.linears[0](one) + self.linears[1](two)  # [B, 1]
        heads = len(self.weight)
        blocks = one.view(-1, heads, one.shape[1] // heads).transpose(0, 1) @ self.weight.to(one.dtype)
        crossed = blocks.transpose(0, 1).flatten(1) * two  # [heads, B, H_2 / heads] -> [B, H_2]
        logit: Tensor = first_order + crossed.sum(1, keepdim=True)
        return logit

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """`gate.<stream> [B, F]`: mean of each field's gates, between 0 and 2."""
        inputs, contexts = self._split(e)
        return {f"gate.{s}": gate(contexts).view(inputs.shape).mean(2) for s, gate in enumerate(self.gates, 1)}

    def _split(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What the perceptrons read of `e [B, F, D]`, and what the gates read."""
        if not self.context_dims:
            return e, e
        return e[:, :, : -self.context_dims], e[:, :, -self.context_dims :]


class Gate(nn.Module):
    """Twice the sigmoid of a perceptron on some of the fields, one number per input: 2 σ(W ReLU(…) + b).

    Args:
        context: names of the fields to look at; none: a learned vector, the same for every row.
        hidden: width of each hidden layer.
        width: number of inputs to gate.

    Raises:
        RecipeError: there is no such field.
    """

    index: Tensor

    def __init__(self, fields: Fields, context: tuple[str, ...], hidden: tuple[int, ...], width: int) -> None:
        super().__init__()
        for name in context:
            if name not in fields.names:
                near = difflib.get_close_matches(name, fields.names, n=1, cutoff=0.5)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise RecipeError(f"context: there is no field '{name}'.{hint} Fields: {', '.join(fields.names)}")
        places = [fields.names.index(name) for name in context]
        self.register_buffer("index", torch.tensor(places, dtype=torch.int64), persistent=False)
        self.learned = None if context else nn.Parameter(torch.zeros(1, fields.dim))
        self.stack = MLPBlock(max(1, len(context)) * fields.dim, hidden)
        self.last = linear(self.stack.width, width)

    def forward(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, width]`, between 0 and 2."""
        context = e.index_select(1, self.index).flatten(1) if self.learned is None else self.learned
        gates: Tensor = 2.0 * torch.sigmoid(self.last(self.stack(context)))
        return gates.expand(e.shape[0], -1)  # a learned vector gives one row for all


@hookimpl
def recsys_components() -> list[Component]:
    """Return the interaction."""
    return [Component("interaction", "finalmlp", FinalMLP)]
