"""``headrace bench-serve``: load for a server, and what its clients see."""

from __future__ import annotations

import typer


def bench_serve() -> None:
    raise typer.Exit(1)
