"""`recsys new-plugin NAME --kind KIND`: a working plugin package to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import open_registry


def command(
    name: Annotated[str, typer.Argument(help="Name of the component, for example `mixer`.")],
    kind: Annotated[str, typer.Option("--kind", help="What it is, for example `interaction`.")] = "interaction",
    out: Annotated[Path, typer.Option("--out", help="Folder to write the package folder into.")] = Path("."),
) -> None:
    """Write a working plugin package: a component, its test, a README and a recipe that trains with it.

    `recsys new-plugin mixer --kind interaction` writes `recsys-mixer/`; its README says how to install, test and
    train. Then change the component into yours.
    """
    registry = open_registry()
    from recsys.plugin.scaffold import write

    folder = write(name, kind, out, registry)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(file)
    print(f"\nNext: cd {folder} && pip install -e '.[test]' && pytest && recsys train example.yaml")
