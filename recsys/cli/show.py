"""`recsys show NAME`: everything about one component."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.extras import PluginFiles, Without, open_registry

if TYPE_CHECKING:
    from recsys.plugin.registry import Registered

SHAPES: dict[str, str] = {
    "source": "scan(split) -> polars.LazyFrame of raw rows",
    "embedding": "ids [B, F], values [B, F] -> [B, F, D]",
    "selector": "e [B, F, D], ids [B, F] -> [B, F, D]",
    "sequence": "target [B, W], history [B, L, W], length [B] -> [B, W]",
    "interaction": "e [B, F, D] -> [B, H]",
    "loss": "{task: [B]}, batch -> []",
    "sampler": "draw(draws, count) -> item numbers [B, count]; log_q() -> [I]",
    "propensity": "fit(rows); estimate(batch) -> [B] in (0, 1]",
    "metric": "logit [B], label [B] -> []",
    "stage": "run(run)",
    "exporter": "export(model, example, folder)",
}

PLACES: dict[str, str] = {
    "source": "data:\n  source:",
    "embedding": "model:\n  embedding:",
    "selector": "model:\n  selector:",
    "sequence": "model:\n  sequence:",
    "interaction": "model:\n  interaction:",
    "loss": "loss:",
    "sampler": "sampling:\n  sampler:",
    "propensity": "propensity:",
    "metric": "stages:\n  - use: evaluate\n    metrics:\n      - ",
    "stage": "stages:\n  - ",
    "exporter": "stages:\n  - use: export\n    exporters:\n      - ",
}
"""Where a recipe uses a component of each kind; empty where no part of a recipe takes it."""


def command(
    name: Annotated[str, typer.Argument(help="Name of a component, for example `autoint`.")],
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one component: what it computes, its shapes, its options with types and defaults, and YAML to paste.

    `recsys show fm` prints the formula and the options of the factorisation machine. A name that two kinds
    have shows both.
    """
    entries = open_registry(plugin, without).find(name)
    if as_json:
        print(json.dumps([as_dict(entry) for entry in entries], indent=2, default=str))
        return
    for entry in entries:
        _print(entry)


def as_dict(entry: Registered) -> dict[str, Any]:
    """Return what `--json` prints about a component."""
    return {
        "kind": entry.component.kind,
        "name": entry.component.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "module": entry.module,
        "summary": entry.doc.summary,
        "description": entry.doc.body,
        "shapes": SHAPES[entry.component.kind],
        "options": [vars(option) for option in entry.options],
        "stages": [dict(stage) for stage in entry.component.stages],
        "yaml": snippet(entry),
    }


def snippet(entry: Registered) -> str:
    """Return YAML to paste into a recipe, with every option at its default."""
    kind, name = entry.component.kind, entry.component.name
    lines = [f"use: {name}"]
    for option in entry.options:
        lines.append(f"{option.name}: {'…  # required' if option.required else _flow(option.default)}")
    place = PLACES[kind]
    if not place:
        return "\n".join(lines)
    *before, last = place.split("\n")
    if last.endswith("- "):
        last, lines = last + lines[0], lines[1:]
    indent = " " * (len(last) - len(last.lstrip()) + 2)
    return "\n".join([*before, last, *(indent + line for line in lines)])


def _flow(value: Any) -> str:
    """Write a default as a recipe has it, on one line."""
    import yaml

    # Through JSON: a recipe has lists and text where Python has tuples and paths.
    plain = json.loads(json.dumps(value, default=str))
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _unwrapped(body: str) -> str:
    """Join the lines that only the width of the source broke, so that the terminal's width can break them."""
    return re.sub(r"(?m)^(.{90,})\n(?=\S)(?!\S+ [=←])", r"\1 ", body)


def _print(entry: Registered) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.syntax import Syntax
    from rich.table import Table

    console = Console()
    component = entry.component
    console.rule(f"[bold]{component.name}[/] · {component.kind} · {escape(entry.origin)}", align="left")
    console.print(escape(entry.doc.summary or "(no description)"))
    if entry.doc.body:
        console.print("\n" + escape(_unwrapped(entry.doc.body)))
    console.print(f"\n[bold]shapes[/]  {escape(SHAPES[component.kind])}\n")
    if entry.options:
        table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
        for option in entry.options:
            default = "required" if option.required else _flow(option.default)
            table.add_row(*map(escape, (option.name, option.type, default, option.description)))
        console.print(table)
    else:
        console.print("It has no options.")
    if component.stages:
        console.print(f"\n[bold]stages[/]  {escape(' → '.join(str(stage['use']) for stage in component.stages))}")
    console.print()
    console.print(Syntax(snippet(entry), "yaml", background_color="default"))
