"""Options that several commands share, named as llama.cpp's users know them."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A path, a known name, or org/repo:QUANT.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine to read.")]

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or reference.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="CPU threads.", show_default="all cores"),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", "-c", min=1, help="Tokens of context to keep.", show_default="chosen to fit"
    ),
]

_SAMPLING = "Sampling"
Temperature = Annotated[
    float,
    typer.Option("--temperature", "--temp", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int,
    typer.Option("--top-k", help="Keep the k likeliest; 0: all.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Keep this much probability.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Drop what is this much rarer than the best.", rich_help_panel=_SAMPLING
    ),
]
RepeatPenalty = Annotated[
    float,
    typer.Option("--repeat-penalty", help="1 is off.", rich_help_panel=_SAMPLING),
]
RepeatLastN = Annotated[
    int,
    typer.Option(
        "--repeat-last-n",
        help="Tokens the repeat penalty looks back on; -1: all.",
        rich_help_panel=_SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="0 is off.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="0 is off.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        help="Same seed, same text.",
        show_default="random",
        rich_help_panel=_SAMPLING,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", help="Longest answer, in tokens.", show_default="the context"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; may be repeated."),
]
System = Annotated[str | None, typer.Option("--system", "-sys", help="The system message.")]
