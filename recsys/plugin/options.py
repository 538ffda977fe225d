"""A factory's signature is the schema of its recipe options.

Keyword-only parameters become a strict pydantic model: `int` refuses `1.5`, `"3"` and `true`, `float` takes an
integer, `tuple[int, ...]` takes a list. Values are checked as JSON, which has exactly the types that a recipe has.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import pydantic
import pydantic_core

from recsys.errors import PluginError, RecipeError, did_you_mean
from recsys.plugin import docstrings

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from recsys.plugin.registry import Registry

Path = tuple[str | int, ...]
"""Keys and list positions from the recipe's root."""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_CONFIG = pydantic.ConfigDict(strict=True, extra="forbid", protected_namespaces=())
_EXPECTED = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "bool_type": "true or false",
    "string_type": "str",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
}


@dataclass(frozen=True)
class Option:
    """One recipe option of a component, as `recsys show` prints it."""

    name: str
    type: str
    required: bool
    default: Any
    description: str


def positional(factory: Callable[..., Any]) -> tuple[int, int]:
    """Return how many positional arguments the factory needs at least and takes at most."""
    found = [p for p in _signature(factory).parameters.values() if p.kind in _POSITIONAL]
    return sum(p.default is Parameter.empty for p in found), len(found)


def accepted(factory: Callable[..., Any], offered: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return as many of the positional arguments that the builder has to offer as the factory takes."""
    return offered[: positional(factory)[1]]


def options_model(factory: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """Build the strict model of a factory's keyword-only parameters.

    Raises:
        PluginError: a parameter cannot be an option (no annotation, `*args`, `**kwargs`, a type that no recipe
            can write, a default that does not fit its own annotation); the message says what to change.
    """
    label = _label(factory)
    described = docstrings.read(factory).args
    fields: dict[str, Any] = {}
    for parameter, annotation in _options(factory):
        name = parameter.name
        default = ... if parameter.default is Parameter.empty else parameter.default
        info = pydantic.Field(default, description=described.get(name), alias=_public(name))
        # A field may not shadow a method of BaseModel (`copy`, `schema`), so such names live behind their alias.
        clashes = name.startswith("_") or name in dir(pydantic.BaseModel)
        fields[f"option_{name}" if clashes else name] = (annotation, info)
    try:
        model: type[pydantic.BaseModel] = pydantic.create_model(f"{label}Options", __config__=_CONFIG, **fields)
    except pydantic.errors.PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise PluginError(f"{label}: an option has a type that a recipe cannot write: {reason}") from None
    _check_defaults(label, model)
    return model


def describe(factory: Callable[..., Any]) -> tuple[Option, ...]:
    """Return a factory's options in the order of its signature."""
    described = docstrings.read(factory).args
    return tuple(
        Option(
            name=_public(parameter.name),
            type=type_name(annotation),
            required=parameter.default is Parameter.empty,
            default=None if parameter.default is Parameter.empty else parameter.default,
            description=described.get(parameter.name, ""),
        )
        for parameter, annotation in _options(factory)
    )


def check(
    model: type[pydantic.BaseModel], component: str, given: Mapping[str, Any], where: str, at: Path
) -> dict[str, Any]:
    """Return every option of a component: those given, checked, and the defaults of the others.

    Args:
        model: result of `options_model`.
        component: name of the component, for messages.
        given: the options as the recipe holds them.
        where: path of the component in the recipe, in words; it begins each message.
        at: the same path in parts.

    Raises:
        RecipeError: unknown or missing option, or a wrong type; its `path` leads to the value.
    """
    try:
        text = pydantic_core.to_json(dict(given), inf_nan_mode="constants")
    except pydantic_core.PydanticSerializationError as error:
        raise RecipeError(f"{where}: '{component}' has an option that is no recipe value: {error}", path=at) from None
    try:
        checked = model.model_validate_json(text)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
    else:
        return {field.alias or name: getattr(checked, name) for name, field in model.model_fields.items()}
    grouped: dict[Path, list[ErrorDetails]] = {}
    for detail in details:
        grouped.setdefault(_locate(detail, given), []).append(detail)
    lines = [_message(model, component, where, loc, same) for loc, same in grouped.items()]
    raise RecipeError("\n".join(lines), path=(*at, *next(iter(grouped))))


def arguments(checked: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked options as arguments of the factory: the option `from` is its parameter `from_`."""
    return {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in checked.items()}


def join(where: str, path: Path) -> str:
    """Write a path in words: `model.interaction` and `("hidden", 1)` give `model.interaction.hidden[1]`."""
    for part in path:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    return where


def split(where: str) -> Path:
    """Return the parts of a path in words: `stages[2].epochs` gives `("stages", 2, "epochs")`."""
    return tuple(int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", where))


def type_name(annotation: Any) -> str:
    """Write an annotation as a reader of recipes knows it: `tuple[int, ...]`, `int | None`, `'a' | 'b'`."""
    inner = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(inner[0])
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(part) for part in inner)
    if origin is not None and inner:
        return f"{origin.__name__}[{', '.join('...' if part is ... else type_name(part) for part in inner)}]"
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of the recipe's components: `$defs` by kind, and by `kind.name`.

    A place in the recipe that takes, say, an interaction refers to `#/$defs/interaction`.
    """
    defs: dict[str, Any] = {}
    for entry in registry.all():
        kind, key = entry.component.kind, f"{entry.component.kind}.{entry.component.name}"
        schema = entry.model.model_json_schema(ref_template=f"#/$defs/{key}.{{model}}")
        for name, nested in schema.pop("$defs", {}).items():
            defs[f"{key}.{name}"] = nested
        schema["title"] = entry.component.name
        schema["description"] = entry.doc.summary
        schema["properties"] = {"use": {"const": entry.component.name}} | schema.get("properties", {})
        schema["required"] = ["use", *schema.get("required", [])]
        defs[key] = schema
        choices = defs.setdefault(kind, {"anyOf": [{"enum": []}]})
        if not entry.model.model_json_schema().get("required"):
            choices["anyOf"][0]["enum"].append(entry.component.name)  # `interaction: fm`, without a mapping
        choices["anyOf"].append({"$ref": f"#/$defs/{key}"})
    return {"$defs": defs}


def _public(name: str) -> str:
    """The option of a parameter: one called `from_`, for Python has a word of that name, is `from` in recipes."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _label(factory: Callable[..., Any]) -> str:
    return str(getattr(factory, "__qualname__", None) or type(factory).__name__)


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{_label(factory)}: its signature cannot be read: {error}") from None


def _options(factory: Callable[..., Any]) -> Iterable[tuple[Parameter, Any]]:
    """Yield the keyword-only parameters with their annotations resolved."""
    label = _label(factory)
    only: list[Parameter] = []
    for parameter in _signature(factory).parameters.values():
        if parameter.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
            stars = "**" if parameter.kind is Parameter.VAR_KEYWORD else "*"
            raise PluginError(
                f"{label} takes {stars}{parameter.name}; write its options out as keyword-only parameters "
                f"with types, for example `def __init__(self, fields, *, layers: int = 3)`"
            )
        if parameter.kind is Parameter.KEYWORD_ONLY:
            if parameter.annotation is Parameter.empty:
                raise PluginError(f"{label}: option '{parameter.name}' has no type; write `{parameter.name}: int = …`")
            only.append(parameter)
    # Only the options are resolved: positional parameters may name types that are imported for checkers alone.
    holder = type(label, (), {"__annotations__": {p.name: p.annotation for p in only}})
    try:
        hints = typing.get_type_hints(holder, globalns=_globals(factory), include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise PluginError(
            f"{label}: the type of an option cannot be resolved ({error}); import it outside `if TYPE_CHECKING`"
        ) from None
    return [(parameter, hints[parameter.name]) for parameter in only]


def _globals(factory: Callable[..., Any]) -> dict[str, Any]:
    if isinstance(factory, functools.partial):
        return _globals(factory.func)
    function = inspect.unwrap(factory.__init__ if isinstance(factory, type) else factory)  # type: ignore[misc]
    found: dict[str, Any] = getattr(function, "__globals__", {})
    return found


def _check_defaults(label: str, model: type[pydantic.BaseModel]) -> None:
    """Refuse a default that its own annotation refuses, such as `dim: int = None`."""
    defaults = {field.alias or n: field.default for n, field in model.model_fields.items() if not field.is_required()}
    try:
        model.model_validate_json(pydantic_core.to_json(defaults, inf_nan_mode="constants"))
    except pydantic_core.PydanticSerializationError:
        return  # a default that a recipe cannot write (an object) is the factory's own affair
    except pydantic.ValidationError as error:
        wrong = [detail for detail in error.errors(include_url=False) if detail["type"] != "missing"]
        if wrong:
            name = wrong[0]["loc"][0]
            raise PluginError(
                f"{label}: the default of option '{name}' ({defaults[str(name)]!r}) does not fit its type"
            ) from None


def _locate(detail: ErrorDetails, given: Any) -> Path:
    """Return the path to the wrong value; pydantic mixes in the members of unions, which a recipe has not."""
    path: list[str | int] = []
    value = given
    for part in detail["loc"]:
        if isinstance(value, Mapping):
            inside = part in value or str(part) in map(str, value)
        else:
            inside = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if inside:
            value = value[part] if not isinstance(value, Mapping) or part in value else None
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _message(
    model: type[pydantic.BaseModel], component: str, where: str, loc: Path, details: list[ErrorDetails]
) -> str:
    """One line about the value at `loc`; a union yields one detail per member."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    kind = details[0]["type"]
    if len(loc) == 1 and kind in ("extra_forbidden", "missing"):
        name = str(loc[0])
        known = f"Options: {', '.join(names)}" if names else f"'{component}' has no options"
        if kind == "missing":
            return f"{where}: '{component}' needs the option '{name}'. {known}"
        return f"{join(where, loc)}: '{component}' has no option '{name}'.{did_you_mean(name, names)} {known}"
    if kind == "extra_forbidden":
        keys = sorted({name for inner in _inside(model, loc[:-1]) for name in inner.model_fields})
        known = f".{did_you_mean(str(loc[-1]), keys)} Keys: {', '.join(keys)}" if keys else ""
        return f"{join(where, loc)}: unknown key{known}"
    if kind == "missing":
        return f"{join(where, loc)}: this key is missing"
    if kind == "value_error" and isinstance(details[0]["input"], Mapping):  # a rule of a whole block says what it met
        return f"{join(where, loc)}: {details[0]['msg'].removeprefix('Value error, ')}"
    got = reprlib.repr(details[0]["input"])
    wanted = list(dict.fromkeys(_expected(detail) for detail in details))
    return f"{join(where, loc)}: {' or '.join(wanted)}, got {got}".replace(" or expected ", " or ")


def _inside(model: type[pydantic.BaseModel], path: Path) -> list[type[pydantic.BaseModel]]:
    """Return the models that may stand at a path of a model's values: several where a union leaves the choice."""
    if not path:
        return [model]
    named = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    inner = _models(named.get(str(path[0])))
    found = []
    for part, depth in inner:  # of a mapping or a list, the next step is one of its keys
        if depth < len(path):
            found += _inside(part, path[1 + depth :])
    return found


def _models(annotation: Any, depth: int = 0) -> list[tuple[type[pydantic.BaseModel], int]]:
    """Return the models in an annotation, and how many mappings or lists they are in."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [(annotation, depth)]
    inside = depth + (typing.get_origin(annotation) in (dict, list, tuple))
    return [found for part in typing.get_args(annotation) for found in _models(part, inside)]


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] in _EXPECTED:
        return f"expected {_EXPECTED[detail['type']]}"
    message = detail["msg"]
    for start, ours in (("Input should be a valid ", "expected a valid "), ("Input should be ", "expected ")):
        if message.startswith(start):
            return ours + message.removeprefix(start)
    return message[:1].lower() + message[1:]
