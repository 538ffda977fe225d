"""The recipe reader: strict YAML with lines, bases and overrides."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import RecipeError
from recsys.recipe import reader


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 1e-3),
        ("5", 5),
        ("-7", -7),
        ("1_000", 1000),
        ("0.5", 0.5),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("012", "012"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1e400", float("inf")),
    ],
)
def test_words_mean_what_they_look_like(word: str, value: object) -> None:
    read = reader.parse(f"key: {word}", "r.yaml").value["key"]
    assert read == value
    assert type(read) is type(value)


def test_quoted_numbers_stay_text() -> None:
    assert reader.parse("a: '5'\nb: \"true\"", "r.yaml").value == {"a": "5", "b": "true"}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(number: float) -> None:
    assert float(reader.scalar(repr(number))) == number


@given(st.integers())
def test_every_integer_reads_back(number: int) -> None:
    assert reader.scalar(str(number)) == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r\.yaml:3: the key 'a' stands here a second time \(first: line 1\)"),
        ("x:\n  a: 1\n  a: 2\n", r"r\.yaml:3: the key 'a'"),
        ("a: !!python/object/apply:os.system ['touch marker']", r"r\.yaml:1: the tag"),
        ("a: !thing 3", r"r\.yaml:1: the tag"),
        ("a: &x [1]\nb: *x", r"r\.yaml:1: anchors and aliases"),
        ("a: [1, 2", r"r\.yaml:1: not valid YAML"),
        ("- a\n- b", r"r\.yaml:1: a recipe is a mapping"),
        ("a:\n\tb: 1", r"r\.yaml:2: not valid YAML"),
        ("? [1, 2]\n: 3", r"r\.yaml:1: a key is a word"),
    ],
)
def test_bad_yaml_is_one_error_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        reader.parse(text, "r.yaml")


def test_hostile_sizes_end_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match="nested deeper than"):
        reader.parse("a: " + "[" * 100_000, "r.yaml")
    with pytest.raises(RecipeError, match="a recipe has at most"):
        reader.read(write(tmp_path, "big.yaml", "a: " + "x" * 2_000_000))
    assert time.monotonic() - started < 5


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1\nb: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: not UTF-8"):
        reader.read(path)


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "quickstart.yaml", "a: 1")
    with pytest.raises(RecipeError, match=r"Did you mean 'quickstart\.yaml'"):
        reader.read(tmp_path / "quikstart.yaml")


def test_base_lies_below_and_options_of_another_component_go(tmp_path: Path) -> None:
    write(
        tmp_path,
        "base.yaml",
        "model: {interaction: {use: mlp, hidden: [4]}, head: {wide: true}}\ntrain: {epochs: 3, seed: 1}",
    )
    top = write(tmp_path, "top.yaml", "base: base.yaml\nmodel: {interaction: {use: fm}}\ntrain: {epochs: 9}")
    document = reader.read(top)
    assert document.value == {
        "model": {"interaction": {"use": "fm"}, "head": {"wide": True}},
        "train": {"epochs": 9, "seed": 1},
    }
    assert document.where(("train", "epochs")) == "top.yaml:3"
    assert document.where(("train", "seed")) == "base.yaml:2"


def test_bases_in_a_circle_end(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml")
    with pytest.raises(RecipeError, match="name each other as base"):
        reader.read(write(tmp_path, "b.yaml", "base: a.yaml"))


def apply(value: dict[str, object], *texts: str) -> dict[str, object]:
    document = reader.Document(value)
    for text in texts:
        document = reader.override(document, text)
    return document.value


def test_overrides_reach_into_mappings_lists_and_names() -> None:
    start: dict[str, object] = {"model": {"interaction": "fm"}, "stages": [{"use": "fit"}, {"use": "evaluate"}]}
    assert apply(start, "train.epochs=2")["train"] == {"epochs": 2}
    assert apply(start, "stages[1].metrics=[auc, ece]")["stages"] == [
        {"use": "fit"},
        {"use": "evaluate", "metrics": ["auc", "ece"]},
    ]
    assert apply(start, "model.interaction.layers=3")["model"] == {"interaction": {"use": "fm", "layers": 3}}
    assert apply(start, "train.learning_rate=1e-3")["train"] == {"learning_rate": 1e-3}
    with_options: dict[str, object] = {"model": {"interaction": {"use": "mlp", "hidden": [1]}}}
    assert apply(with_options, "model.interaction.use=fm")["model"] == {"interaction": {"use": "fm"}}
    assert start == {"model": {"interaction": "fm"}, "stages": [{"use": "fit"}, {"use": "evaluate"}]}, "input changed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.epochs", "expected path.to.option=value"),
        ("=3", "expected path.to.option=value"),
        ("stages[7].epochs=3", "'7' is no position in a list of 1"),
        ("train.epochs.deep=3", "has no keys"),
    ],
)
def test_a_wrong_override_says_why(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply({"stages": [{"use": "fit"}], "train": {"epochs": 3}}, text)


def test_nothing_is_interpolated() -> None:
    assert apply({}, "a=${HOME}", "b=@file:/etc/passwd") == {"a": "${HOME}", "b": "@file:/etc/passwd"}
