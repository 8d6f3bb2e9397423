"""The public face: a loaded model, and how to ask it for text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from headrace.engine.engine import Engine
from headrace.engine.request import Completion, Request
from headrace.engine.sequence import Event
from headrace.gguf.reader import GGUFFile
from headrace.model.decoder import Config
from headrace.sampling import Logits, LogitsMask, SamplingParams
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
            from headrace.text.template import ChatTemplate

            self._template = ChatTemplate.from_metadata(self._file.metadata, self.tokenizer)
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
