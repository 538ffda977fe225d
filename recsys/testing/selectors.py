"""What a selector promises; see `recsys.contracts.Selector`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys import contracts
from recsys.contracts import Fields, Selection
from recsys.nn.head import Head
from recsys.nn.interaction import MLP
from recsys.nn.model import Model
from recsys.nn.table import Table
from recsys.testing import modules, samples
from recsys.testing.kit import Check, expect
from recsys.testing.modules import ROWS, Inputs


class Subject:
    """`[B, F, D], [B, F] -> [B, F, D]`."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory

    def build(self, count: int = 3) -> nn.Module:
        """Build on `count` fields, in the middle of its schedule."""
        module: nn.Module = self.factory(samples.fields(count))
        modules.call(module, "anneal", 0.5)
        return module

    def inputs(self, rows: int, count: int = 3) -> Inputs:
        """`e [B, F, D], ids [B, F]`."""
        fields = samples.fields(count)
        return samples.vectors(rows, count), samples.ids(rows, fields)

    def shape(self, module: nn.Module, rows: int, count: int = 3) -> tuple[int, ...]:
        """`[B, F, D]`."""
        return (rows, count, samples.DIM)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """B."""
        return ({0: batch}, {0: batch})

    def objective(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The output, for every id of every field, and the penalty."""
        fields = samples.fields(inputs[0].shape[1])
        every = torch.arange(max(fields.rows)).unsqueeze(1).minimum(torch.tensor(fields.rows) - 1)  # [N, F]
        e = samples.vectors(len(every), len(fields), seed=8)
        return (
            modules.random_sum(module(*inputs))
            + modules.random_sum(module(e, every))
            + cast("Tensor", modules.call(module, "penalty"))
        )


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a selector."""
    subject = Subject(build)
    return [
        *modules.checks(subject),
        Check("penalty", "return a float32 tensor `[]`; zero when there is none", lambda: _penalty(subject)),
        Check("anneal", "keep the schedule in a buffer and set it from `progress` alone", lambda: _anneal(subject)),
        Check("kept", "return a Selection of bool masks `[rows]` and `[D]`, changing nothing", lambda: _kept(subject)),
        Check(
            "scores",
            "return field → tensor `[]` or `[rows]` for every field, changing nothing",
            lambda: _scores(subject),
        ),
        Check(
            "pruned_equals_masked",
            "after anneal(1.0), in eval mode, pass on exactly what kept() names: gate 1, or factor() if there is one, "
            "where kept, 0 elsewhere",
            lambda: _pruned(subject),
        ),
    ]


def _penalty(subject: Subject) -> None:
    penalty = modules.call(modules.disturb(subject.build()).train(), "penalty")
    expect(isinstance(penalty, Tensor), f"penalty returned {type(penalty).__name__}, expected a tensor")
    expect(penalty.shape == () and penalty.dtype == torch.float32, f"penalty is {penalty.dtype} {tuple(penalty.shape)}")
    modules.finite(penalty, "penalty")


def _anneal(subject: Subject) -> None:
    inputs = subject.inputs(ROWS)
    for start in (0.0, 1.0):
        module = modules.disturb(subject.build()).eval()
        fresh = modules.disturb(subject.build()).eval()
        fresh.load_state_dict(module.state_dict())
        for progress in (start, 0.25):
            modules.call(module, "anneal", progress)
        modules.call(fresh, "anneal", 0.25)
        wanted = module(*inputs)
        modules.close(wanted, fresh(*inputs), f"anneal(0.25) after anneal({start}) and alone differ")
        loaded = subject.build().eval()
        loaded.load_state_dict(module.state_dict())
        modules.close(loaded(*inputs), wanted, "after anneal(0.25), a new one with the same state")
        modules.finite(cast("Tensor", modules.call(module, "penalty")), "the penalty during annealing")


def _kept(subject: Subject) -> None:
    fields = samples.fields(3)
    for module in _searched(subject):
        selection = _pure(module, "kept")
        expect(isinstance(selection, Selection), f"kept returned {type(selection).__name__}, expected a Selection")
        strange = [name for name in (*selection.fields, *selection.rows, *selection.dims) if name not in fields.names]
        expect(not strange, f"kept names {', '.join(strange)}, which are no fields")
        for name, mask in selection.rows.items():
            _mask(mask, fields.rows[fields.names.index(name)], f"rows of {name}")
        for name, mask in selection.dims.items():
            _mask(mask, fields.dim, f"dims of {name}")
        again = modules.call(module, "kept")
        same = again.fields == selection.fields and _equal(again.rows, selection.rows)
        expect(same and _equal(again.dims, selection.dims), "two calls of kept differ")


def _scores(subject: Subject) -> None:
    fields = samples.fields(3)
    for module in _searched(subject):
        scores = _pure(module, "scores")
        expect(isinstance(scores, Mapping), f"scores returned {type(scores).__name__}, expected a mapping")
        expect(set(scores) == set(fields.names), f"scores has {sorted(scores)}, the fields are {list(fields.names)}")
        for name, value in scores.items():
            rows = fields.rows[fields.names.index(name)]
            fine = isinstance(value, Tensor) and value.shape in ((), (rows,))
            expect(fine, f"the score of {name} must be a tensor [] or [{rows}]")
            modules.finite(value, f"the score of {name}")


def _pruned(subject: Subject) -> None:
    for seed, module in enumerate(_searched(subject)):
        torch.manual_seed(seed)
        model, fields = _model(module)
        batch = samples.batch(64, model.schema)
        with torch.no_grad():
            selection: Selection = modules.call(module, "kept")
            gated = module(model.embedding(batch.ids, None), batch.ids)
            smaller = model.prune(selection).eval()
            pruned = smaller.represent(batch.ids)
            modules.close(pruned, gated, f"the table pruned to {len(selection.fields)} of {len(fields)} fields", 1e-6)
            logits = model(batch)["label"]
            modules.close(smaller(batch)["label"], logits, "the pruned model's logits", 1e-5)


def _searched(subject: Subject) -> Iterator[nn.Module]:
    """Yield selectors at the end of their search, with different decisions."""
    for seed in range(3):
        torch.manual_seed(seed)
        module = modules.disturb(subject.build(), scale=1.0, seed=seed)
        modules.call(module, "anneal", 1.0)
        yield module.eval()


def _model(selector: nn.Module) -> tuple[Model, Fields]:
    fields = samples.fields(3)
    columns = zip(fields.names, fields.rows, strict=True)
    of = contracts.EncodedSchema(tuple(contracts.Field(name, rows) for name, rows in columns))
    table = Table(of, dim=samples.DIM, init_std=1.0)
    interaction = MLP(Model.consumer_fields(of, table), hidden=(8,))
    head = Head(of, [interaction])
    model = Model(of, table, cast("contracts.Selector", selector), {}, [interaction], head).eval()
    return model, table.fields


def _pure(module: nn.Module, name: str) -> Any:
    """Call a method that must change neither the module nor the random numbers that training will draw."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    random = torch.get_rng_state()
    result = modules.call(module, name)
    expect(torch.equal(random, torch.get_rng_state()), f"{name} draws random numbers")
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    expect(not changed, f"{name} changes {', '.join(changed)}")
    return result


def _mask(mask: object, size: int, what: str) -> None:
    fine = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (size,)
    expect(fine, f"kept: the {what} must be a bool tensor [{size}]")


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
