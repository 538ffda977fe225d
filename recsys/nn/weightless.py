"""Models without weights, to be given those of a file: never more memory than the file's tensors take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Build modules whose parameters have a shape and no memory; buffers are as ever.

    A model that is pruned inside stays without weights: the whole table is never there.
    """

    def light(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta:
            return param
        return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    handle = register_module_parameter_registration_hook(light)  # type: ignore[arg-type]  # may return a parameter
    try:
        yield
    finally:
        handle.remove()


def is_weightless(module: nn.Module) -> bool:
    """Whether a part of the module has no values yet."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module its state, in the file's own tensors where it has no weights yet.

    Raises:
        RuntimeError: the names or the shapes differ.
        NotImplementedError: something that was computed from weights is not saved, and so has no values.
    """
    module.load_state_dict(weights, assign=is_weightless(module))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise NotImplementedError(f"'{name}' has no values: the saved state does not hold it")
