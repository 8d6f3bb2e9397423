"""``headrace synth``: a GGUF of a known shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli import console
from headrace.cli.options import Json
from headrace.errors import RequestError

_Shape = Annotated[str, typer.Argument(metavar="SHAPE", help="llama-1b, llama-8b, qwen2.5-0.5b, …")]
_Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Q4_K_M, Q8_0, F16, …")]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The file to write.", show_default="SHAPE-RECIPE.gguf"),
]
_Seed = Annotated[int, typer.Option("--seed", "-s", min=0, help="Same seed, same bytes.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


def synth(
    shape: _Shape,
    recipe: _Recipe = "Q4_K_M",
    output: _Output = None,
    seed: _Seed = 0,
    force: _Force = False,
    as_json: Json = False,
) -> None:
    """Write a GGUF of a known shape with random, valid weights.

    For benchmarks where nothing can be downloaded: it runs as fast as the real model, and says
    nothing that makes sense.
    """
    from headrace.synth import write_synthetic

    recipe = recipe.upper()
    path = output or Path(f"{shape}-{recipe}.gguf")
    if path.exists() and not force:
        raise RequestError(f"{path} exists: give another --output, or --force to replace it")
    with console.byte_progress("writing") as progress:
        write_synthetic(
            path, shape, recipe, seed, lambda done, total: progress(path.name, done, total)
        )
    if as_json:
        print(json.dumps({"path": str(path), "size": path.stat().st_size}))
    else:
        print(path)
