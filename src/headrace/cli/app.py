"""The commands, gathered. Their modules import nothing heavy until they run."""

from __future__ import annotations

from typing import Annotated

import typer

import headrace
from headrace.cli import (
    bench,
    bench_serve,
    chat,
    info,
    models,
    ppl,
    profile,
    pull,
    run,
    serve,
    synth,
)

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headrace {headrace.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. Works after a command, too.")
    ] = False,
) -> None:
    """Run GGUF language models at the speed of memory.

    MODEL is the path of a .gguf file, a known name (see 'headrace models'),
    or org/repo:QUANT on the Hugging Face hub.
    """


app.command()(run.run)
app.command()(chat.chat)
app.command()(info.info)
app.command()(pull.pull)
app.command()(models.models)
app.command()(bench.bench)
app.command()(profile.profile)
app.command()(ppl.ppl)
app.command()(synth.synth)
app.command()(serve.serve)
app.command("bench-serve")(bench_serve.bench_serve)
