"""Recipe options from a factory's signature: types, messages, paths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import PluginError, RecipeError
from recsys.plugin import options
from recsys.plugin.registry import load_registry

if TYPE_CHECKING:
    from nowhere import Fields, Tensor


class Attention:
    """Attend over fields.

    Args:
        layers: how many layers,
            one after the other.
        heads: attention heads per layer.
    """

    def __init__(
        self,
        fields: Fields,
        *,
        layers: int = 3,
        heads: int = 2,
        dropout: float = 0.0,
        hidden: tuple[int, ...] = (64, 64),
        act: Literal["relu", "gelu"] = "relu",
        scale: bool = True,
        weights: Mapping[str, float] | None = None,
        dim: int | Literal["auto"] = "auto",
        rate: Annotated[float, pydantic.Field(gt=0)] = 1.0,
    ) -> None: ...


NAMES = "layers, heads, dropout, hidden, act, scale, weights, dim, rate"


def check(spec: Mapping[str, Any], factory: Any = Attention) -> dict[str, Any]:
    at = options.split("model.interaction")
    return options.check(options.options_model(factory), "autoint", spec, "model.interaction", at)


def test_given_options_are_checked_and_the_others_take_their_defaults() -> None:
    checked = check({"layers": 1, "dropout": 1, "hidden": [8], "weights": {"a": 2}, "dim": 4, "rate": math.inf})
    assert checked == {
        "layers": 1,
        "heads": 2,
        "dropout": 1.0,
        "hidden": (8,),
        "act": "relu",
        "scale": True,
        "weights": {"a": 2.0},
        "dim": 4,
        "rate": math.inf,
    }
    assert type(checked["dropout"]) is float
    assert type(checked["hidden"]) is tuple


@pytest.mark.parametrize(
    ("spec", "message", "path"),
    [
        ({"head": 3}, f"head: 'autoint' has no option 'head'. Did you mean 'heads'? Options: {NAMES}", ("head",)),
        ({"zzzz": 3}, f"zzzz: 'autoint' has no option 'zzzz'. Options: {NAMES}", ("zzzz",)),
        ({"hidden": [3, "x"]}, "hidden[1]: expected int, got 'x'", ("hidden", 1)),
        ({"hidden": 3}, "hidden: expected a list, got 3", ("hidden",)),
        ({"layers": 1.5}, "layers: expected int, got 1.5", ("layers",)),
        ({"layers": 1.0}, "layers: expected int, got 1.0", ("layers",)),
        ({"layers": "3"}, "layers: expected int, got '3'", ("layers",)),
        ({"layers": True}, "layers: expected int, got True", ("layers",)),
        ({"layers": None}, "layers: expected int, got None", ("layers",)),
        ({"dropout": "0.1"}, "dropout: expected float, got '0.1'", ("dropout",)),
        ({"dropout": False}, "dropout: expected float, got False", ("dropout",)),
        ({"scale": 1}, "scale: expected true or false, got 1", ("scale",)),
        ({"act": "tanh"}, "act: expected 'relu' or 'gelu', got 'tanh'", ("act",)),
        ({"weights": {"a": "b"}}, "weights.a: expected float, got 'b'", ("weights", "a")),
        ({"weights": 1}, "weights: expected a mapping, got 1", ("weights",)),
        ({"dim": 1.5}, "dim: expected int or 'auto', got 1.5", ("dim",)),
        ({"rate": 0}, "rate: expected greater than 0, got 0", ("rate",)),
    ],
)
def test_message_and_path(spec: Mapping[str, Any], message: str, path: tuple[str | int, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        check(spec)
    assert str(caught.value) == f"model.interaction.{message}"
    assert caught.value.path == ("model", "interaction", *path)


def test_every_wrong_option_has_its_line() -> None:
    with pytest.raises(RecipeError) as caught:
        check({"layers": "x", "hidden": [1, None], "head": 2})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.interaction.layers",
        "model.interaction.hidden[1]",
        "model.interaction.head",
    ]


def test_a_required_option_is_asked_for() -> None:
    def factory(*, dim: int, name: str) -> None: ...

    with pytest.raises(RecipeError) as caught:
        check({"name": "x"}, factory)
    assert str(caught.value) == "model.interaction: 'autoint' needs the option 'dim'. Options: dim, name"
    assert caught.value.path == ("model", "interaction", "dim")


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=3)))
def test_types_are_exact_for_any_value(value: Any) -> None:
    """An independent oracle: which Python types each annotation stands for."""
    allowed = {
        "layers": type(value) is int,
        "dropout": type(value) in (int, float),
        "scale": type(value) is bool,
        "hidden": type(value) is list and all(type(v) is int for v in value),
    }
    for name, fine in allowed.items():
        if fine:
            got = check({name: value})[name]
            wanted = {"hidden": tuple, "dropout": float}.get(name, lambda same: same)(value)
            assert wanted == got or math.isnan(value)
        else:
            with pytest.raises(RecipeError, match=re.escape(f"model.interaction.{name}: expected ")):
                check({name: value})


def test_option_names_that_pydantic_uses_itself_work() -> None:
    def factory(*, copy: bool = False, schema: str = "a", model_config: int = 1, _hidden: int = 0) -> None: ...

    spec = {"copy": True, "schema": "b", "model_config": 2, "_hidden": 3}
    assert check(spec, factory) == spec


def test_dataclasses_partials_and_inherited_constructors_have_options() -> None:
    @dataclass(kw_only=True)
    class Stage:
        epochs: int = 5

    class Child(Attention):
        pass

    assert check({"epochs": 2}, Stage) == {"epochs": 2}
    assert check({}, partial(Attention, layers=7))["layers"] == 7
    assert check({"heads": 4}, Child)["heads"] == 4


def test_what_cannot_be_an_option_is_refused_with_the_remedy() -> None:
    def kwargs(fields: Any, **options: Any) -> None: ...
    def args(*fields: Any) -> None: ...
    def untyped(*, layers=3) -> None: ...
    def hidden(*, x: Tensor) -> None: ...
    def wrong_default(*, dim: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013
    def unwritable(*, x: threading_lock) -> None: ...  # noqa: F821

    for factory, message in [
        (kwargs, r"kwargs takes \*\*options; write its options out as keyword-only parameters"),
        (args, r"args takes \*fields; write"),
        (untyped, r"option 'layers' has no type; write `layers: int = …`"),
        (hidden, r"'Tensor' is not defined.*import it outside `if TYPE_CHECKING`"),
        (wrong_default, r"the default of option 'dim' \(None\) does not fit its type"),
        (unwritable, r"threading_lock"),
    ]:
        with pytest.raises(PluginError, match=message):
            options.options_model(factory)


def test_a_type_that_no_recipe_can_write_is_refused() -> None:
    class Opaque: ...

    def factory(*, x: Any) -> None: ...

    factory.__annotations__["x"] = Opaque
    with pytest.raises(PluginError, match="has a type that a recipe cannot write"):
        options.options_model(factory)


def test_descriptions_come_from_the_docstring() -> None:
    described = {option.name: option for option in options.describe(Attention)}
    assert described["layers"].description == "how many layers, one after the other."
    assert described["layers"].type == "int"
    assert described["act"].type == "'relu' | 'gelu'"
    assert described["weights"].type == "Mapping[str, float] | None"
    assert described["rate"].type == "float"
    schema = options.options_model(Attention).model_json_schema()
    assert schema["properties"]["heads"]["description"] == "attention heads per layer."
    assert schema["additionalProperties"] is False


@given(st.lists(st.one_of(st.integers(0, 99), st.from_regex(r"[a-z_]{1,5}", fullmatch=True)), max_size=5))
def test_paths_in_words_and_in_parts_say_the_same(path: list[str | int]) -> None:
    whole = ("model", *path)
    assert options.split(options.join("", whole)) == whole


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (tuple[int, ...], "tuple[int, ...]"),
        (tuple[Annotated[str, "mark"], ...], "tuple[str, ...]"),
        (Literal["a", "b"] | None, "'a' | 'b' | None"),
        (Mapping[str, list[float]], "Mapping[str, list[float]]"),
        (Any, "Any"),
    ],
)
def test_types_are_written_as_recipes_know_them(annotation: Any, text: str) -> None:
    assert options.type_name(annotation) == text


TWO = """
from recsys.plugin.hooks import Component, hookimpl
class Plain:
    '''Plain one.'''
    def __init__(self, fields, *, layers: int = 3): ...
class Needs:
    def __init__(self, fields, *, dim: int): ...
@hookimpl
def recsys_components():
    return [Component('interaction', 'plain_one', Plain), Component('interaction', 'needs_dim', Needs)]
"""


def test_the_json_schema_lists_components_by_kind(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(TWO)
    schema = options.json_schema(load_registry(files=[file], environ={"RECSYS_DISABLE": "*"}))
    plain = schema["$defs"]["interaction.plain_one"]
    assert plain["properties"]["use"] == {"const": "plain_one"}
    assert plain["properties"]["layers"]["type"] == "integer"
    assert plain["required"] == ["use"]
    assert plain["additionalProperties"] is False
    assert plain["description"] == "Plain one."
    assert schema["$defs"]["interaction.needs_dim"]["required"] == ["use", "dim"]
    short = schema["$defs"]["interaction"]["anyOf"][0]["enum"]
    assert "plain_one" in short
    assert "needs_dim" not in short  # it cannot be written as a name alone
    references = {choice["$ref"] for choice in schema["$defs"]["interaction"]["anyOf"][1:]}
    assert {"#/$defs/interaction.plain_one", "#/$defs/interaction.needs_dim"} <= references


@pytest.mark.parametrize(
    ("kind", "name", "given", "message"),
    [
        ("embedding", "table", {"dim": 0}, "x.dim: expected greater than 0, got 0"),
        ("embedding", "table", {"init_std": -1}, "x.init_std: expected greater than or equal to 0, got -1"),
        ("interaction", "cross", {"layers": -1}, "x.layers: expected greater than or equal to 0, got -1"),
        ("interaction", "cross", {"rank": 0}, "x.rank: expected greater than 0, got 0"),
        ("interaction", "mlp", {"hidden": [8, 0]}, "x.hidden[1]: expected greater than 0, got 0"),
        ("interaction", "mlp", {"dropout": 1}, "x.dropout: expected less than 1, got 1"),
        ("interaction", "autoint", {"heads": 0}, "x.heads: expected greater than 0, got 0"),
        ("interaction", "autoint", {"dropout": 1.5}, "x.dropout: expected less than 1, got 1.5"),
        ("interaction", "autoint_plus", {"mlp_dropout": -0.1}, "x.mlp_dropout: expected greater than or equal to 0"),
    ],
)
def test_sizes_and_shares_out_of_range_are_refused_before_anything_runs(
    kind: Any, name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_registry(environ={}).check(kind, {"use": name, **given}, "x")
    assert message in str(caught.value)
