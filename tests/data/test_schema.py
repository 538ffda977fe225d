"""The data block: shorthands, defaults, and mistakes that are refused with a suggestion."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from recsys.data import schema
from recsys.data.schema import Categorical, DataConfig, Label


def parse(**block: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {"use": "files"}, "label": "y", "categorical": ["a", "b"], **block})


def test_lists_and_empty_options_mean_defaults() -> None:
    assert parse(categorical=["a", "b"]) == parse(categorical={"a": None, "b": {}})
    assert parse(numeric=["n"]).numeric["n"].transform == "standard"
    assert parse(label={"click": "y", "like": {"column": "r", "at_least": 4}}).label == {
        "click": Label(column="y"),
        "like": Label(column="r", at_least=4),
    }


def test_field_options_win_over_defaults() -> None:
    block = parse(
        defaults={"min_count": 5, "null_values": "?", "normalize": "strip", "max_bytes": 99},
        categorical={
            "a": None,
            "b": {"min_count": 1, "null_values": [], "normalize": ["nfc", "lower"], "max_bytes": 7},
            "h": {"hash_buckets": 8},
            "s": {"share": "b"},
        },
    )
    common: dict[str, Any] = {"null_values": ("?",), "normalize": ("strip",), "max_bytes": 99}
    assert block.options("a") == Categorical(min_count=5, **common)
    own: dict[str, Any] = {"normalize": ("nfc", "lower"), "max_bytes": 7}
    assert block.options("b") == Categorical(min_count=1, null_values=(), **own)
    assert block.options("h") == Categorical(hash_buckets=8, **common)
    found = block.options("s")
    assert (found.share, found.null_values, found.min_count) == ("b", ("?",), None)
    assert (found.normalize, found.max_bytes) == (own["normalize"], own["max_bytes"]), "those of the vocabulary's owner"


def test_columns_are_listed_once() -> None:
    block = parse(numeric=["n"], context={"group": "a", "time": "t"}, sequences={"p": {"columns": {"a": "pa"}}})
    assert block.columns() == ("a", "b", "n", "pa", "y", "t")
    assert block.columns(labels=False) == ("a", "b", "n", "pa")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"categorical": ["a", "a"]}, "listed twice: a"),
        ({"categorical": [1]}, "expected column names, or a mapping from column name to options"),
        ({"numeric": ["a"]}, "column 'a' is listed under categorical and under numeric; keep one"),
        ({"label": "b"}, "label 'label' is column 'b', which is an input too"),
        ({"label": {}}, "needs at least one task"),
        ({"categorical": []}, "no inputs"),
        ({"categorical": {"item": {}, "b": {"share": "itme"}}}, "'itme' is no other .* Did you mean 'item'"),
        ({"categorical": {"a": {"share": "a"}}}, "'a' is no other categorical"),
        (
            {"categorical": {"a": {}, "b": {"share": "a"}, "c": {"share": "b"}}},
            "'b' itself shares 'a'; name that field",
        ),
        ({"categorical": {"a": {"share": "b", "min_count": 2}, "b": {}}}, "belong to the field that is shared"),
        ({"categorical": {"a": {"hash_buckets": 9, "max_size": 2}}}, "hash_buckets keeps no vocabulary"),
        ({"categorical": {"a": {"min_cuont": 2}}}, "min_cuont"),
        ({"categorical": {"a": {"min_count": 0}}}, "greater than or equal to 1"),
        ({"categorical": {"a": {"min_count": "2"}}}, "valid integer"),
        ({"sequences": {"p": {"columns": {"aa": "h"}}}}, "sequences.p.columns: 'aa' is no categorical field. Did you"),
        ({"sequences": {"p": {"columns": {}}}}, "at least one"),
        ({"sequences": {"a": {"columns": {"a": "h"}}}}, "sequences.a: the name is taken by categorical"),
        ({"label": {"y": {"column": "y", "at_least": 1, "positive": [1]}}}, "exclude each other"),
        ({"context": {"wieght": "w"}}, "wieght"),
        ({"split": {"by": "tiem", "column": "t"}}, "'time', 'hash', 'column'"),
        ({"numeric": {"n": {"transform": "sqrt"}}}, "'standard', 'log', 'raw' or 'quantile'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_mistakes_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(**block)


def test_every_option_says_what_it_does() -> None:
    models = [m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, BaseModel) and m.model_fields]
    undocumented = [
        f"{m.__name__}.{name}"
        for m in models
        for name, f in m.model_fields.items()
        if not f.description and name != "by"
    ]
    assert len(models) >= 11
    assert undocumented == []
