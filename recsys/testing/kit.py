"""The conformance kit: what every component of a kind must do, run against one of them.

from recsys.testing import contract
from my_plugin import Mixer

def test_contract():
    contract("interaction", Mixer, layers=2)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recsys.errors import RecsysError, did_you_mean, listing
from recsys.plugin.hooks import KINDS, Component, Kind

Factory = Callable[..., Any]

MODULES: dict[Kind, str] = {
    "source": "sources",
    "embedding": "embeddings",
    "selector": "selectors",
    "sequence": "sequences",
    "interaction": "interactions",
    "loss": "losses",
    "sampler": "samplers",
    "propensity": "propensities",
    "metric": "metrics",
    "stage": "stages",
    "exporter": "exporters",
}
"""Kind → module of `recsys.testing` with its `checks(build)`; imported when needed, since most import torch."""


class ContractError(AssertionError):
    """A component that breaks its contract; the message has one line per failed check.

    Args:
        component: what was checked.
        failures: (check, what is wrong, how to fix it).
    """

    def __init__(self, component: str, failures: Sequence[tuple[str, str, str]]) -> None:
        alike: dict[str, list[tuple[str, str]]] = {}
        for name, wrong, fix in failures:
            alike.setdefault(wrong, []).append((name, fix))
        lines = [
            f"\n- {', '.join(name for name, _ in group)}: {wrong}"
            f"\n  fix: {group[0][1] if len(group) == 1 else 'these checks fail for one and the same reason'}"
            for wrong, group in alike.items()
        ]
        super().__init__(f"{component} fails {len(failures)} check(s) of its contract:" + "".join(lines))
        self.failed = tuple(name for name, _, _ in failures)


@dataclass(frozen=True)
class Check:
    """One promise of a kind.

    Args:
        name: how it is called in messages.
        fix: one line on what usually keeps the promise.
        run: raises when it is broken.
    """

    name: str
    fix: str
    run: Callable[[], None]


class Contract:
    """Call it with a kind, a factory and recipe options, or with a `Component` and options.

    Args:
        left_out: names of checks that are not run.
    """

    def __init__(self, left_out: frozenset[str] = frozenset()) -> None:
        self.left_out = left_out

    def __call__(self, kind: Kind | Component, factory: Factory | None = None, /, **options: Any) -> None:
        """Run every check of the kind.

        Args:
            kind: the kind, or a component, which brings its factory along.
            factory: the class under test.
            options: recipe options to build it with; those not given take their defaults.

        Raises:
            ContractError: some checks fail; all of them are listed.
        """
        if isinstance(kind, Component):
            component = kind
        elif factory is None:
            raise TypeError("contract(kind, factory, **options) or contract(component, **options)")
        else:
            component = Component(kind, "component", factory)
        # Imported here, because pytest imports this module at each start through the fixtures beside it.
        from recsys.plugin import options as schema
        from recsys.plugin.loading import reason, validate

        label = f"{component.kind} '{getattr(component.factory, '__name__', component.factory)}'"
        try:
            validate([component])
            given = schema.options_model(component.factory)
            checked = schema.check(given, component.name, options, component.kind, (component.kind,))
        except RecsysError as error:
            fix = "options are keyword-only parameters with types, after what the builder hands over"
            raise ContractError(label, [("options", str(error), fix)]) from None

        def build(*positional: Any) -> Any:
            return component.factory(*schema.accepted(component.factory, positional), **schema.arguments(checked))

        failures: list[tuple[str, str, str]] = []
        for check in self._checks(component.kind, build):
            if check.name in self.left_out:
                continue
            try:
                check.run()
            except AssertionError as error:
                failures.append((check.name, str(error).strip() or "it does not hold", check.fix))
            except Exception as error:
                failures.append((check.name, reason(error), check.fix))
        if failures:
            raise ContractError(label, failures)

    def checks(self, kind: Kind) -> tuple[str, ...]:
        """Return the names of a kind's checks, in the order in which they run."""
        return ("options", *(check.name for check in self._checks(kind, _no_factory)))

    def without(self, *names: str) -> Contract:
        """Return the contract without some checks, for a component that breaks one by its nature.

        A pairwise loss, for instance: `contract.without("bce_equality")("loss", Pairwise)`.

        Raises:
            ValueError: no kind has a check of that name.
        """
        known = {name for kind in KINDS for name in self.checks(kind)}
        for name in names:
            if name not in known:
                raise ValueError(f"no check '{name}'.{did_you_mean(name, known)} Checks: {listing(sorted(known))}")
        return Contract(self.left_out | set(names))

    def _checks(self, kind: Kind, build: Factory) -> list[Check]:
        module = importlib.import_module(f"recsys.testing.{MODULES[kind]}")
        found: list[Check] = module.checks(build)
        return found


def _no_factory(*positional: Any) -> Any:
    raise NotImplementedError


def expect(condition: object, message: str) -> None:
    """Raise `AssertionError` with `message` unless `condition` holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


contract = Contract()
"""The contract with all checks."""
