"""Load a model: what waits for what, so that the first token comes soon (docs/decisions/019).

What is large is imported within :func:`load`: a GPU is opened meanwhile.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace import hub
from headrace.devices import check_cache_type, choose_device, load_runner, opening
from headrace.errors import TemplateError
from headrace.stages import stage

if TYPE_CHECKING:
    from headrace.api import Model
    from headrace.model.decoder import Decoder
    from headrace.text.template import ChatTemplate
    from headrace.text.tokenizer import Tokenizer


def load(
    name: str | os.PathLike[str],
    device: str = "auto",
    *,
    context: int | None = None,
    threads: int | None = None,
    progress: hub.Progress | None = None,
    loading: hub.Progress | None = None,
    chat: bool = False,
    max_sequences: int = 16,
    cache_tokens: int | None = None,
    batch_invariant: bool = False,
    cache_type: str = "f16",
) -> Model:
    """Load a model, fetching it first if need be.

    name: a path, a known name (``"smollm2"``) or ``"org/repo:QUANT"``.
    device: ``"cpu"``, ``"cuda"``, ``"reference"``, or ``"auto"``: a GPU if there is one that can be
    used, which it says on stderr, else the CPU.
    context: most tokens of one conversation (default: 8,192, or the model's own if shorter). Keys
    and values for it are set aside; on a CPU the memory is only taken as it is used.
    threads: CPU threads (default: all cores). progress: called as a file is fetched.
    loading: called as weights go to a GPU: the file's name, their bytes so far, and all of them.
    chat: a chat comes first: what renders its template is started meanwhile, if the file has one.
    max_sequences: most that run at once. cache_tokens: most tokens of all of them together
    (default: one context). batch_invariant: an answer does not depend on how many others are made
    beside it; a GPU is slower for few of them then (docs/decisions/014). cache_type: keys and
    values as ``"f16"``, or on a GPU ``"q8_0"``, in about half the memory (docs/decisions/016).

    Raises HubError, GGUFError, TokenizerError, ModelError, DeviceError or RequestError.

    >>> model = headrace.load("smollm2")
    >>> model.generate("The capital of France is", max_tokens=8, temperature=0).text
    """
    with stage("load"), opening(device if threads is None else "cpu"):
        device = choose_device(device, threads)
        check_cache_type(cache_type, device)
        path = hub.resolve(name, progress)
        with _no_collections():
            return _load(
                path, device, threads, loading, chat, context, max_sequences, cache_tokens,
                batch_invariant=batch_invariant, cache_type=cache_type,
            )  # fmt: skip


def _load(
    path: Path,
    device: str,
    threads: int | None,
    loading: hub.Progress | None,
    chat: bool,
    context: int | None,
    max_sequences: int,
    cache_tokens: int | None,
    **options: Any,
) -> Model:
    from headrace.api import Model
    from headrace.engine.engine import Engine
    from headrace.engine.scheduler import pages_for
    from headrace.gguf.reader import open_gguf
    from headrace.model.loader import load_decoder

    # The tokeniser takes as long to build as the rest of a small model.
    with ThreadPoolExecutor(1, "headrace-tokenizer") as thread:
        with stage("header"):
            file = open_gguf(path)
        try:
            text = thread.submit(_load_text, file.metadata, chat)
            with stage("decoder"):
                decoder = load_decoder(file, check_weights=device != "cuda")
            with stage("runner", file.n_bytes):
                progress = loading and _sum(loading, path.name, decoder)
                runner = load_runner(
                    decoder, device, threads, max_sequences, progress=progress, **options
                )
            try:
                tokenizer, template = text.result()
                n_pages = None if cache_tokens is None else pages_for(cache_tokens)
                with stage("cache"):
                    engine = Engine(
                        runner, tokenizer,
                        context=context, n_pages=n_pages, max_sequences=max_sequences,
                    )  # fmt: skip
            except BaseException:
                runner.close()
                raise
        except BaseException:
            file.close()
            raise
    return Model(file, engine, device, template)


def _sum(show: hub.Progress, name: str, decoder: Decoder) -> Callable[[int], None]:
    """``show`` as what is told the bytes of each piece."""
    total, done = sum(tensor.n_bytes for tensor in decoder.weights.values()), 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done = min(done + n_bytes, total)  # some are laid out twice
        show(name, done, total)

    return add


@contextmanager
def _no_collections() -> Iterator[None]:
    """The merges of a vocabulary are some 200,000 tuples, none of them garbage, and the
    collector would look for some again and again as they are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load_text(metadata: Mapping[str, Any], chat: bool) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokeniser, built; and the chat template, starting, if it is wanted and there is one."""
    from headrace.text.tokenizer import Tokenizer

    with stage("vocabulary"):
        tokenizer = Tokenizer.from_metadata(metadata)
    template = None
    if chat:
        from headrace.text.template import ChatTemplate

        with suppress(TemplateError):  # asking for Model.chat_template raises it again
            template = ChatTemplate.from_metadata(metadata, tokenizer)
            template.prepare()
    with stage("tokeniser's encoder"):
        tokenizer.prepare()
    return tokenizer, template
