"""Options that several commands share, named as llama.cpp's users know them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headrace.api import Options

    Sampling = Options
else:
    Sampling = dict  # typer asks what it is, and headrace.api would load NumPy

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
CacheType = Annotated[
    str,
    typer.Option("--cache-type", help="Keys and values: f16, or on a GPU q8_0 (half the memory)."),
]

Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; may be repeated."),
]
System = Annotated[str | None, typer.Option("--system", "-sys", help="The system message.")]

_SAMPLING = "Sampling"
_MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", help="Longest answer, in tokens.", show_default="the context"
    ),
]
_Temperature = Annotated[
    float,
    typer.Option("--temperature", "--temp", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
_TopK = Annotated[
    int,
    typer.Option("--top-k", help="Keep the k likeliest; 0: all.", rich_help_panel=_SAMPLING),
]
_TopP = Annotated[
    float,
    typer.Option("--top-p", help="Keep this much probability.", rich_help_panel=_SAMPLING),
]
_MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Drop what is this much rarer than the best.", rich_help_panel=_SAMPLING
    ),
]
_RepeatPenalty = Annotated[
    float,
    typer.Option("--repeat-penalty", help="1 is off.", rich_help_panel=_SAMPLING),
]
_RepeatLastN = Annotated[
    int,
    typer.Option(
        "--repeat-last-n",
        help="Tokens the repeat penalty looks back on; -1: all.",
        rich_help_panel=_SAMPLING,
    ),
]
_PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="0 is off.", rich_help_panel=_SAMPLING)
]
_FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="0 is off.", rich_help_panel=_SAMPLING)
]
_Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        help="Same seed, same text.",
        show_default="random",
        rich_help_panel=_SAMPLING,
    ),
]


def sampling(
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 40,
    top_p: _TopP = 0.95,
    min_p: _MinP = 0.05,
    repeat_penalty: _RepeatPenalty = 1.0,
    repeat_last_n: _RepeatLastN = 64,
    presence_penalty: _PresencePenalty = 0.0,
    frequency_penalty: _FrequencyPenalty = 0.0,
    seed: _Seed = None,
) -> Sampling:
    """The library's options by the command line's names."""
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repeat_penalty,
        "repeat_last_n": repeat_last_n,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of :func:`sampling` in the place of its argument ``options``."""
    flags = inspect.signature(sampling, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def called(**given: Any) -> None:
        options = sampling(**{name: given.pop(name) for name in flags})
        command(**given, options=options)

    shown: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        shown += flags.values() if name == "options" else [parameter]
    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    called.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return called
