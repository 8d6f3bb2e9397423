"""``headrace ppl``: perplexity of a text, measured as llama.cpp's ``perplexity`` does it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import console
from headrace.cli.options import CacheType, Device, Json, ModelName, Threads
from headrace.errors import RequestError

if TYPE_CHECKING:
    from headrace.api import Model


_BUILT_IN = Path(__file__).parent.parent / "data/ppl.txt"
_File = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help="A UTF-8 text.", show_default="a short text that comes with headrace"
    ),
]
_Chunk = Annotated[int, typer.Option("--context", "-c", min=8, help="Tokens of a chunk.")]


def ppl(
    model: ModelName,
    file: _File = None,
    context: _Chunk = 512,
    threads: Threads = None,
    device: Device = "auto",
    cache_type: CacheType = "f16",
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text: lower is better.

    The text is cut into chunks of --context tokens, each seen on its own; the second half of each
    counts. The default text is short: compare its figure with itself only.
    """
    text = console.read_text(file or _BUILT_IN)
    with console.Status() as status:
        loaded = console.load(
            model, status, device=device, context=context, threads=threads, cache_type=cache_type
        )
    with loaded:
        facts = measure(loaded, text, context)
    facts = {
        "model": model,
        "text": str(file or "built-in"),
        "device": loaded.engine.runner.device_name,
    } | facts
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"perplexity {facts['perplexity']:.4f} ± {facts['standard_error']:.4f} over "
            f"{facts['counted_tokens']:,} tokens in {facts['chunks']} chunks of {context}"
        )
        console.say(f"{facts['tokens_per_second']:.1f} tok/s")


def measure(model: Model, text: str, context: int) -> dict[str, Any]:
    """Perplexity of ``text`` in chunks of ``context`` tokens, with its standard error."""
    tokens = model.tokenize(text, bos=True)
    n_chunks = len(tokens) // context
    if n_chunks == 0:
        raise RequestError(
            f"the text has {len(tokens)} tokens, fewer than a chunk of {context}: "
            "give a longer text or a smaller --context"
        )
    # As llama.cpp: a model that starts its prompts with BOS has it at the start of each chunk.
    bos = tokens[:1] if model.tokenizer.add_bos else []
    losses: list[float] = []
    start = time.perf_counter()
    for index in range(n_chunks):
        chunk = bos + tokens[index * context + len(bos) : (index + 1) * context]
        losses += _losses(model, chunk, first=context // 2)
        mean = math.fsum(losses) / len(losses)
        console.say(f"chunk {index + 1}/{n_chunks}: perplexity so far {math.exp(mean):.4f}")
    seconds = time.perf_counter() - start
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
    return {
        "perplexity": math.exp(mean),
        "standard_error": math.exp(mean) * math.sqrt(variance / len(losses)),
        "mean_nll": mean,
        "context": context,
        "chunks": n_chunks,
        "counted_tokens": len(losses),
        "tokens_per_second": n_chunks * context / seconds,
    }


def _losses(model: Model, chunk: list[int], first: int) -> list[float]:
    """Negative log probabilities (nats) of the tokens after position ``first``, each given all
    before it in the chunk."""
    import numpy as np

    from headrace.reference.accuracy import TEXT_CHUNK, teacher_forced

    losses: list[float] = []
    for block in teacher_forced(model.engine.runner, chunk, first + 1, TEXT_CHUNK):
        for row in block[: len(chunk) - first - 1 - len(losses)]:  # the last row predicts beyond
            top = row.max()
            total = float(np.exp(row - top, dtype=np.float64).sum())
            losses.append(math.log(total) + float(top - row[chunk[first + 1 + len(losses)]]))
    return losses
