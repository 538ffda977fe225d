"""`recsys verify`: prove that a bundle is whole, safe, and gives the scores that it was exported with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.extras import make_console, require


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or of a run that has one.")],
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Allow listed files that hold code; nothing here runs them."),
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File with the key that must have signed the bundle.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that scoring may use.")] = 1,
) -> None:
    """Compare every file of a bundle with its hash, refuse what could run code, and score its golden rows.

    `recsys verify runs/mine/bundle`

    Needs onnxruntime (the extra `serve` brings it), not torch. The exit status is 0 only if everything is as
    it was written.
    """
    require("serve", ("onnxruntime",))
    from recsys.deploy.bundle import REQUESTS, open_bundle
    from recsys.deploy.predictor import Predictor
    from recsys.deploy.signature import read_key

    console = make_console()
    inside = bundle / "bundle"
    folder = inside if inside.is_dir() else bundle
    key = None if key_file is None else read_key(key_file)
    opened = open_bundle(folder, trust_code=trust_code, key=key)
    console.print(f"{folder}: {opened.id}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(opened.manifest['files'])} files are those that were written", highlight=False)
    for name in opened.manifest["executable"] or ():
        console.print(f"{name} is a program; nothing loads it unless told to", highlight=False, markup=False)
    if key is not None:
        console.print("the manifest is signed by the key")
    predictor = Predictor(opened, threads=threads)
    worst = predictor.check_golden()
    rows = len(opened.lines(REQUESTS))
    tolerance = opened.manifest["tolerance"]
    console.print(f"{rows} golden rows agree within {worst:.1g} (tolerance {tolerance:g})", highlight=False)
