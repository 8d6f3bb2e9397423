"""The public face: load a model, ask it for text."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from headrace import hub
from headrace.devices import check_cache_type, choose_device, load_runner, opening
from headrace.engine.engine import Engine
from headrace.engine.request import Completion, Request
from headrace.engine.scheduler import pages_for
from headrace.engine.sequence import Event
from headrace.errors import TemplateError
from headrace.gguf.reader import GGUFFile, open_gguf
from headrace.model.decoder import Config
from headrace.model.loader import load_decoder
from headrace.sampling import Logits, LogitsMask, SamplingParams
from headrace.stages import stage
from headrace.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headrace.text.template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``[{"role": "user", "content": "Hello"}, …]``."""


class Options(TypedDict, total=False):
    """How to generate; all optional. Values out of range raise RequestError naming the option.

    max_tokens: the most to generate; None, the default, goes on to the end of the context.
    stop: a string, or some, that end the text and are left out of it.
    stop_ids: token ids that end it, besides the model's own. ignore_eos: those do not.
    mask: constrained decoding (:class:`headrace.sampling.LogitsMask`).

    The others, with their defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05, penalties
    off, a fresh seed: llama.cpp's), are those of :class:`headrace.sampling.SamplingParams`.
    """

    max_tokens: int | None
    stop: str | Sequence[str]
    stop_ids: Set[int]
    ignore_eos: bool
    mask: LogitsMask | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logprobs: int | None
    logit_bias: Mapping[int, float]


_SAMPLING_OPTIONS = frozenset(field.name for field in fields(SamplingParams))


def make_request(tokens: Sequence[int], options: Mapping[str, Any]) -> Request:
    """The request for ``tokens`` with :class:`Options`; TypeError for an option there is not."""
    sampling = {name: options[name] for name in options if name in _SAMPLING_OPTIONS}
    others = {name: options[name] for name in options if name not in _SAMPLING_OPTIONS}
    return Request(tokens, sampling=SamplingParams(**sampling), **others)


def load(
    name: str | os.PathLike[str],
    device: str = "auto",
    *,
    context: int | None = None,
    threads: int | None = None,
    progress: hub.Progress | None = None,
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
    chat: a chat comes first: what renders its template is started meanwhile, if the file has one.
    max_sequences: most that run at once. cache_tokens: most tokens of all of them together
    (default: one context). batch_invariant: an answer does not depend on how many others are made
    beside it; a GPU is slower for few of them then (docs/decisions/014). cache_type: keys and
    values as ``"f16"``, or on a GPU ``"q8_0"``, in about half the memory (docs/decisions/016).

    Raises HubError, GGUFError, TokenizerError, ModelError, DeviceError or RequestError.

    >>> model = headrace.load("smollm2")
    >>> model.generate("The capital of France is", max_tokens=8, temperature=0).text
    """
    device = choose_device(device, threads)
    check_cache_type(cache_type, device)
    path = hub.resolve(name, progress)
    with _no_collections(), ExitStack() as meanwhile:
        meanwhile.enter_context(opening(device))
        # The tokeniser takes as long to build as the rest of a small model.
        thread = meanwhile.enter_context(ThreadPoolExecutor(1, "headrace-tokenizer"))
        with stage("header"):
            file = open_gguf(path)
        try:
            text = thread.submit(_load_text, file.metadata, chat)
            with stage("decoder described and weights checked", file.n_bytes):
                decoder = load_decoder(file)
            with stage("runner"):
                runner = load_runner(
                    decoder, device, threads, max_sequences,
                    batch_invariant=batch_invariant, cache_type=cache_type,
                )  # fmt: skip
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
    with stage("vocabulary"):
        tokenizer = Tokenizer.from_metadata(metadata)
    template = None
    if chat:
        with suppress(TemplateError):  # asking for Model.chat_template raises it again
            template = _load_template(metadata, tokenizer)
            template.prepare()
    with stage("tokeniser's encoder"):
        tokenizer.prepare()
    return tokenizer, template


def _load_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
    from headrace.text.template import ChatTemplate

    return ChatTemplate.from_metadata(metadata, tokenizer)


class Model:
    """A loaded model. Close it, or use it as a context manager, to release its memory.

    Prompts are text (BOS goes first if the file asks for it; what looks like a control token stays
    text) or token ids (run as they are). What earlier prompts and answers have in common with the
    next prompt is not computed again. Several threads may use one model: their tokens are made in
    the same steps.
    """

    def __init__(
        self, file: GGUFFile, engine: Engine, device: str, template: ChatTemplate | None = None
    ) -> None:
        self.engine = engine
        self.device = device
        self._file = file
        self._template = template

    @property
    def config(self) -> Config:
        return self.engine.runner.decoder.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """Most tokens of one prompt and its answer."""
        return self.engine.context

    @property
    def counters(self) -> dict[str, int] | None:
        """What a GPU was asked to do so far: ``kernel_launches``, ``graph_launches``,
        ``synchronisations`` (that wait), ``bytes_to_device``, ``bytes_to_host``. None on a CPU."""
        counters = getattr(self.engine.runner, "counters", None)
        return None if counters is None else asdict(counters)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The GGUF file's metadata."""
        return self._file.metadata

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises TemplateError when the file has none."""
        if self._template is None:
            self._template = _load_template(self._file.metadata, self.tokenizer)
        return self._template

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Completion:
        """Continue ``prompt``. Raises RequestError, ContextOverflowError or DeviceError."""
        return self.stream(prompt, **options).run()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> TextStream:
        """As :meth:`generate`, piece by piece as the text is made."""
        tokens = self.tokenize(prompt, bos=True) if isinstance(prompt, str) else prompt
        return self._start(tokens, options)

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """The assistant's next message, by the file's chat template.

        Send the whole conversation each time: of the turns already seen nothing is computed again
        (``completion.timings.cached_tokens``). Raises TemplateError too.
        """
        return self.stream_chat(messages, **options).run()

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> TextStream:
        """As :meth:`chat`, piece by piece as the text is made."""
        return self._start(self.chat_template.encode_chat(messages), options)

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Token ids. special: control tokens written in the text become those tokens. bos: begin
        with BOS if the file asks for it."""
        return self.tokenizer.encode(text, special=special, bos=bos)

    def detokenize(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ``ids``. special: show control tokens."""
        return self.tokenizer.decode(ids, special=special)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits after each of ``tokens``, float32 [len(tokens), n_vocab]."""
        self._file.check_unchanged()
        return self.engine.logits(tokens)

    def close(self) -> None:
        """Cancel what is running and release the memory. Idempotent."""
        self.engine.close()
        if self._template is not None:
            self._template.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, tokens: Sequence[int], options: Options) -> TextStream:
        self._file.check_unchanged()
        return TextStream(self.engine, make_request(tokens, options))


class TextStream:
    """Iterates over the text of an answer as it is made: pieces, none of them empty.

    Closing it (leaving its ``with``, or letting it go) cancels what is not finished. When it has
    ended, :attr:`completion` is the whole answer.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._events: deque[Event] = deque()
        self._ended = False
        self._sequence = engine.add(request, self._events.append)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        # The last event ends the loop, not the sequence's state: another thread may be stepping.
        while self._events or not self._ended:
            while self._events:
                event = self._events.popleft()
                self._ended = event.finish_reason is not None
                if event.error is not None:
                    raise event.error
                if event.text:
                    return event.text
            if not self._ended:
                self._step()
        raise StopIteration

    def _step(self) -> None:
        try:
            self._engine.step()
        except BaseException:  # Ctrl-C: nobody will ask for the rest
            self.close()
            raise

    @property
    def completion(self) -> Completion:
        """The answer. RuntimeError before the stream has ended or was closed."""
        return self._sequence.completion()

    def run(self) -> Completion:
        """Make the rest of the answer, and return all of it."""
        for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """Cancel the answer unless it has ended. Idempotent."""
        self._engine.cancel(self._sequence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sequence"):  # not when the request was refused
            self.close()
