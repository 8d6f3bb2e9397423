"""``headrace run``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli import console
from headrace.cli import options as opt
from headrace.errors import RequestError

if TYPE_CHECKING:
    from headrace.api import Model, TextStream
    from headrace.engine.request import Completion

_Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", help="The prompt; '-' or none: what is piped in."),
]
_PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Take the prompt from a UTF-8 file.")
]
_Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
]
_NoStats = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the answer.")]


@opt.with_sampling
def run(
    model: opt.ModelName,
    prompt: _Prompt = None,
    prompt_file: _PromptFile = None,
    raw: _Raw = False,
    system: opt.System = None,
    stop: opt.Stop = None,
    *,
    options: opt.Sampling,
    context: opt.Context = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    cache_type: opt.CacheType = "f16",
    quiet: _NoStats = False,
    as_json: opt.Json = False,
) -> None:
    """Answer a prompt.

    Models with a chat template answer it as a message; others, and all with --raw, continue it. The
    answer goes to stdout as it is made; its speed follows on stderr.
    """
    text = _prompt(prompt, prompt_file)
    options["stop"] = stop or []
    with (
        console.Status() as status,
        console.load(
            model,
            status,
            device=device,
            context=context,
            threads=threads,
            chat=not raw,
            cache_type=cache_type,
        ) as loaded,  # fmt: skip
        _start(loaded, text, system, options, raw) as stream,
    ):
        status("reading the prompt (the first run compiles kernels)")
        if as_json:
            done = stream.run()
            print(json.dumps(_as_json(model, done) | console.device_work(loaded)))
        else:
            console.write(stream, status)
            if not quiet:
                console.say(console.speed(stream.completion))


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given; RequestError when it was not, or twice."""
    if file is not None:
        if prompt is not None:
            raise RequestError("give a PROMPT or --file, not both")
        text = console.read_text(file)
    elif prompt is not None and prompt != "-":
        text = prompt
    elif prompt is None and sys.stdin.isatty():
        raise RequestError("give a PROMPT, or pipe one in ('headrace chat' converses)")
    else:
        text = console.decode(sys.stdin.buffer.read(), "stdin")
    if not text:
        raise RequestError("the prompt is empty")
    return text


def _start(
    model: Model, text: str, system: str | None, options: opt.Sampling, raw: bool
) -> TextStream:
    if raw or not console.has_chat_template(model):
        if system is not None:
            raise RequestError("--system needs a chat template: there is none, or --raw is given")
        return model.stream(text, **options)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.stream_chat(messages, **options)


def _as_json(model: str, done: Completion) -> dict[str, object]:
    timings = done.timings
    return {
        "model": model,
        "text": done.text,
        "tokens": list(done.tokens),
        "finish_reason": done.finish_reason,
        "prompt_tokens": timings.prompt_tokens,
        "completion_tokens": len(done.tokens),
        "prompt_tokens_per_second": timings.prompt_tokens_per_second,
        "decode_tokens_per_second": timings.decode_tokens_per_second,
        "time_to_first_token": timings.time_to_first_token,
    }
