"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace.backend import PAGE_SIZE
from headrace.engine.pages import ROOT, PagePool, extend_prefix
from headrace.engine.request import Completion, FinishReason, Request, Timings
from headrace.errors import HeadraceError
from headrace.sampling import Sampler, TokenLogprob
from headrace.text.detokenizer import IncrementalDecoder
from headrace.text.stop import StopStrings
from headrace.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Event:
    """One sequence moved on.

    text: what it added, which may be nothing: characters still incomplete, or the beginning of a
    stop string, are held back. token: the id, unless it ended the sequence. finish_reason: set on
    the last event. error: what went wrong, when that is ``"error"``.
    """

    sequence: Sequence
    text: str = ""
    token: int | None = None
    logprobs: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: HeadraceError | None = None


Sink = Callable[[Event], None]
"""Takes a sequence's events, in the thread that steps or cancels. Must not block."""


@dataclass
class Clock:
    """When things happened to a sequence, in ``time.perf_counter`` seconds."""

    added: float
    started: float = 0.0
    first_token: float | None = None
    last_token: float = 0.0

    def tick(self) -> None:
        """A token was sampled."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token


class Sequence:
    """A request, its tokens so far, and the pages that hold their keys and values.

    ``tokens`` is prompt and answer; the first ``n_computed`` of them are in the cache. A sequence
    whose pages were taken away starts again from 0 (or from what the cache still knows) and goes on
    with the same text: the sampler's state is not lost.
    """

    def __init__(self, request: Request, max_tokens: int, tokenizer: Tokenizer, sink: Sink) -> None:
        self.request = request
        self.max_tokens = max_tokens
        self.sink = sink
        self.sampler = Sampler(request.sampling, request.mask)
        self.tokens: list[int] = list(request.tokens)
        self.n_prompt = len(self.tokens)
        self.n_computed = 0
        self.n_cached: int | None = None
        self.pages: list[int] = []
        self.prefixes: list[bytes] = [ROOT]  # of each full page in the cache, and the next
        self.slot: int | None = None
        self.text: list[str] = []
        self._decoder = IncrementalDecoder(tokenizer, continuing=True)
        self._stops = StopStrings(request.stop)
        self._end_ids = request.stop_ids
        if not request.ignore_eos:
            self._end_ids |= tokenizer.end_ids
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.error: HeadraceError | None = None
        self.clock = Clock(added=time.perf_counter())

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens still to be run: the rest of a prompt, or the one sampled last."""
        return len(self.tokens) - self.n_computed

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def ends_with(self, token: int) -> bool:
        """Whether sampling ``token`` ends the answer; it is then no part of it."""
        return token in self._end_ids

    def append(self, token: int, logprob: TokenLogprob | None) -> str:
        """Add a token to the answer; returns the text that is safe to show."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        text = self._stops.push(self._decoder.push(token))
        self.text.append(text)
        return text

    @property
    def stopped(self) -> bool:
        """A stop string has ended the text."""
        return self._stops.matched is not None

    def flush(self) -> str:
        """The text that was held back, for when the answer ends."""
        text = self._stops.push(self._decoder.flush()) + self._stops.flush()
        self.text.append(text)
        return text

    def advance(self, n: int, pool: PagePool) -> None:
        """The next ``n`` tokens are in the cache now; pages that became full can be shared."""
        self.n_computed += n
        while len(self.prefixes) * PAGE_SIZE <= self.n_computed:
            i = len(self.prefixes) - 1
            tokens = self.tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            pool.publish(self.pages[i], self.prefixes[i], tokens)
            self.prefixes.append(extend_prefix(self.prefixes[i], tokens))

    def release_pages(self, pool: PagePool, *, keep: bool = True) -> None:
        """Give up all pages. ``keep``: others may continue a copy of the last, part-full one."""
        i = self.n_computed // PAGE_SIZE
        if keep and self.n_computed % PAGE_SIZE:
            tokens = self.tokens[i * PAGE_SIZE : self.n_computed]
            pool.publish(self.pages[i], self.prefixes[i], tokens)
        for page in reversed(self.pages):  # so that the beginning is kept longest
            pool.release(page)
        self.pages.clear()
        self.prefixes = [ROOT]
        self.n_computed = 0

    def completion(self) -> Completion:
        """The answer so far; ``finish_reason`` must be known."""
        if self.finish_reason is None:
            raise RuntimeError("the sequence has not finished")
        wanted = self.request.sampling.logprobs is not None
        return Completion(
            text="".join(self.text),
            tokens=tuple(self.generated),
            finish_reason=self.finish_reason,
            timings=self.timings,
            logprobs=tuple(self.logprobs) if wanted else None,
        )

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        clock = self.clock
        prompt_seconds = decode_seconds = 0.0
        first_token = None
        if clock.first_token is not None:
            prompt_seconds = clock.first_token - clock.started
            decode_seconds = clock.last_token - clock.first_token
            first_token = clock.first_token - clock.added
        return Timings(
            prompt_tokens=self.n_prompt,
            cached_tokens=self.n_cached or 0,
            prompt_seconds=prompt_seconds,
            decode_tokens=max(0, self.sampler.n_sampled - 1),
            decode_seconds=decode_seconds,
            time_to_first_token=first_token,
        )
