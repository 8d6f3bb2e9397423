"""``headrace profile``: where the time of a token goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli import console
from headrace.cli.options import Device, Json, ModelName, Threads
from headrace.errors import RequestError

_Tokens = Annotated[
    int | None,
    typer.Option("-n", "--tokens", min=1, help="Tokens to decode.", show_default="32"),
]
_Prompt = Annotated[
    int | None,
    typer.Option("-p", "--prompt", min=1, help="Profile a prompt of this length instead."),
]
_Depth = Annotated[int, typer.Option("-d", "--depth", min=0, help="Positions cached before.")]
_Repetitions = Annotated[
    int | None,
    typer.Option("-r", "--repetitions", min=1, help="Of the prompt.", show_default="5"),
]
_Html = Annotated[Path | None, typer.Option("--html", help="Write a report to open in a browser.")]
_Trace = Annotated[
    Path | None, typer.Option("--trace", help="Write a trace to open in ui.perfetto.dev.")
]


def profile(
    model: ModelName,
    tokens: _Tokens = None,
    prompt: _Prompt = None,
    depth: _Depth = 0,
    repetitions: _Repetitions = None,
    threads: Threads = None,
    device: Device = "auto",
    html: _Html = None,
    trace: _Trace = None,
    as_json: Json = False,
) -> None:
    """Show where the time of a token goes: by part, beside the machine's roofline.

    Every part of every operation is timed on the device, its FLOPs and bytes are counted, and the
    worst is named, with what would help. Profiles decoding, or with -p a prompt.
    """
    if prompt is not None and tokens is not None:
        raise RequestError("--prompt profiles a prompt, --tokens decoding: give one of them")
    if prompt is None and repetitions is not None:
        raise RequestError("--repetitions counts prompts: give --prompt too, or --tokens alone")
    for path in (html, trace):
        if path is not None and not path.parent.is_dir():
            raise RequestError(f"cannot write {path}: there is no folder {path.parent}")
    from headrace.profile import profile_model

    path = console.resolve(model)
    with console.Status() as status:
        found = profile_model(
            path, device, tokens=tokens or 32, prompt=prompt or 0, depth=depth,
            repetitions=repetitions or 5, threads=threads, notice=status, label=model,
        )  # fmt: skip
    if html is not None:
        found.write_html(html)
    if trace is not None:
        found.write_trace(trace)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console

    from headrace.profile.terminal import WIDE, show

    terminal = Console()
    show(found, terminal if terminal.is_terminal else Console(width=WIDE))
    for path in (html, trace):
        if path is not None:
            console.say(f"wrote {path}")
