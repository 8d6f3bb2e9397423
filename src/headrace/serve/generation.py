"""Several choices of one request, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from headrace.backend import PAGE_SIZE
from headrace.engine.request import FinishReason, Request
from headrace.engine.sequence import Event
from headrace.engine.sequence import Sequence as EngineSequence
from headrace.errors import HeadraceError
from headrace.sampling import TokenLogprob
from headrace.serve.engine_thread import EngineThread, Stream
from headrace.serve.problems import Problem, from_error, unavailable


@dataclass
class Usage:
    """Tokens of a request: its prompts', those of them found in the cache, and generated."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Choice:
    """One completed choice."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason


@dataclass(frozen=True)
class Piece:
    """What one event added to choice ``index``."""

    index: int
    text: str
    logprobs: TokenLogprob | None
    finish_reason: FinishReason | None


class Generation:
    """Runs ``requests``. Those of a long prompt that another has start once its pages are known.

    Raises Problem: a request that cannot run, or a full queue. Room for all is taken at once, and
    :meth:`cancel` gives all of it back, however far things went.
    """

    def __init__(
        self, engine: EngineThread, requests: Sequence[Request], param: str, timeout: float
    ) -> None:
        """``param``: the field that holds the prompt. ``timeout``: seconds, then it ends."""
        self.usage = Usage()
        self.first_token_seconds: float | None = None
        self._engine, self._timeout = engine, timeout
        self._requests, self._param = list(requests), param
        self._wake = asyncio.Event()
        self._streams = [Stream(self._wake.set) for _ in requests]
        self._problem: Problem | None = None
        self._counted: set[tuple[int, ...]] = set()
        self._followers = _followers(self._requests)
        self._engine.reserve(len(requests))
        self._n_reserved = len(requests)
        self._timer = asyncio.get_running_loop().call_later(timeout, self._expire)
        try:
            following = {i for group in self._followers.values() for i in group}
            self._start(i for i in range(len(requests)) if i not in following)
        except BaseException:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces as they are made, until every choice has ended. Raises Problem when one fails."""
        n_left = len(self._streams)
        while n_left:
            await self._wake.wait()
            self._wake.clear()
            if self._problem is not None:
                raise self._problem
            for index, stream in enumerate(self._streams):
                while stream.events:
                    piece = self._take(index, stream.events.popleft())
                    n_left -= piece.finish_reason is not None
                    if piece.text or piece.logprobs or piece.finish_reason:
                        yield piece

    async def collect(self) -> list[Choice]:
        """All choices, complete."""
        choices = [Choice() for _ in self._streams]
        async for piece in self:
            choices[piece.index].add(piece)
        return choices

    def abort(self, problem: Problem) -> None:
        """End everything now; whoever iterates gets ``problem``."""
        self._problem = self._problem or problem
        self.cancel()
        self._wake.set()

    def cancel(self) -> None:
        """End what has not ended. Idempotent."""
        self._timer.cancel()
        self._engine.unreserve(self._n_reserved)
        self._n_reserved = 0
        for stream in self._streams:
            self._engine.cancel(stream)

    def as_log(self) -> dict[str, object]:
        """Counts and times for the log."""
        usage, first = self.usage, self.first_token_seconds
        return {
            "choices": len(self._streams),
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "first_token_ms": None if first is None else round(1000 * first, 1),
        }

    def _start(self, indices: Iterable[int]) -> None:
        try:
            for i in indices:
                self._engine.submit(self._requests[i], self._streams[i])
                self._n_reserved -= 1  # it gives its room back when it ends
        except HeadraceError as error:
            raise from_error(error, self._param) from error

    def _take(self, index: int, event: Event) -> Piece:
        if index in self._followers:
            self._start(self._followers.pop(index))
        if event.error is not None:
            raise from_error(event.error, self._param) from event.error
        sequence = event.sequence
        if event.token is not None:
            self.usage.completion += 1
            if self.first_token_seconds is None and sequence.clock.first_token is not None:
                self.first_token_seconds = sequence.clock.first_token - sequence.clock.added
        if event.finish_reason is not None:
            self._count(sequence)
            if event.finish_reason == "cancelled":
                raise self._problem or unavailable("the request was cancelled", "cancelled")
        return Piece(index, event.text, event.logprobs, event.finish_reason)

    def _count(self, sequence: EngineSequence) -> None:
        """Add a finished sequence to the usage (a shared prompt counts once)."""
        timings = sequence.timings
        prompt = tuple(sequence.request.tokens)
        if prompt not in self._counted:
            self._counted.add(prompt)
            self.usage.prompt += timings.prompt_tokens
            self.usage.cached += timings.cached_tokens

    def _expire(self) -> None:
        message = f"the answer took more than {self._timeout:g} s"
        self.abort(Problem(504, message, code="timeout"))


def _followers(requests: Sequence[Request]) -> dict[int, list[int]]:
    """Indices of requests that wait for the first one of the same prompt, by its index.

    A prompt of less than a page is never shared: those start at once.
    """
    first: dict[tuple[int, ...], int] = {}
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        prompt = tuple(request.tokens)
        leader = first.setdefault(prompt, i)
        if leader != i and len(prompt) > PAGE_SIZE:
            groups.setdefault(leader, []).append(i)
    return groups
