"""What a component must have, read off the protocol of its kind."""

from __future__ import annotations

import inspect
from typing import Any

from recsys import contracts
from recsys.plugin.hooks import Kind

_ABSENT = object()


def lacking(kind: Kind, part: Any) -> list[str]:
    """Return the attributes and methods of the kind's protocol that `part` lacks, as a message names them."""
    protocol = getattr(contracts, kind.capitalize())
    methods = [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]
    absent = [f"`{name}`" for name in protocol.__annotations__ if getattr(part, name, _ABSENT) is _ABSENT]
    absent += [f"`{name}()`" for name in methods if not callable(getattr(part, name, None))]
    if "__call__" in vars(protocol) and not callable(part):
        absent.append("`forward()` of a `torch.nn.Module`")
    return absent
