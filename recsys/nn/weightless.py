"""Models without weights, to be given those of a file: never more memory than the file's tensors take."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from recsys.errors import RunError


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Build modules whose parameters have a shape and no memory; buffers are as ever.

    A model that is pruned inside stays without weights: the whole table is never there.
    """
    register = nn.Module.register_parameter

    def light(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with unittest.mock.patch.object(nn.Module, "register_parameter", light):
        yield


def is_weightless(module: nn.Module) -> bool:
    """Whether a part of the module has no values yet."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module its state, in the file's own tensors where it has no weights yet.

    Raises:
        RuntimeError: the names or the shapes differ.
        RunError: a part is left without weights.
    """
    module.load_state_dict(weights, assign=is_weightless(module))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise RunError(f"'{name}' has no values: the saved state does not hold it")
