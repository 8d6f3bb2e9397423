"""What the engine is asked, and what it answers with."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from headrace.errors import ContextOverflowError, RequestError
from headrace.sampling import (
    LogitsMask,
    SamplingParams,
    TokenLogprob,
    check_integer,
    check_vocabulary,
)

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""``stop``: an end token, stop id or stop string; ``length``: max_tokens or the context's end."""

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256


@dataclass(frozen=True)
class Request:
    """One completion to make.

    tokens: the prompt's ids. max_tokens: None means until the context ends.
    stop: strings that end the text and are left out of it. stop_ids: token ids that do, as the
    model's own end tokens do unless ``ignore_eos``. mask: constrained decoding.

    Raises RequestError naming the value that is out of range.
    """

    tokens: Sequence[int]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    stop_ids: Set[int] = frozenset()
    ignore_eos: bool = False
    mask: LogitsMask | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos must be true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings, not {len(stop)}")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError(f"stop: each must be a string of 1 to {MAX_STOP_LENGTH} letters")
        object.__setattr__(self, "stop", stop)
        ids = frozenset(check_integer("stop_ids", i, 0, 2**31 - 1) for i in self.stop_ids)
        object.__setattr__(self, "stop_ids", ids)
        tokens = tuple(check_integer("prompt token", i, 0, 2**31 - 1) for i in self.tokens)
        object.__setattr__(self, "tokens", tokens)

    def checked_limit(self, n_vocab: int, context: int) -> int:
        """How many tokens may be generated in a context of ``context`` positions.

        Raises RequestError for ids outside the vocabulary or an empty prompt, and
        ContextOverflowError when prompt and ``max_tokens`` do not fit together.
        """
        n_prompt = len(self.tokens)
        if n_prompt == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if (largest := max(self.tokens)) >= n_vocab:
            raise RequestError(f"prompt token {largest} is not below the vocabulary's {n_vocab}")
        check_vocabulary(self.sampling, n_vocab)
        wanted = 1 if self.max_tokens is None else self.max_tokens
        if n_prompt + wanted > context:
            raise ContextOverflowError(
                f"the prompt's {n_prompt} tokens and {wanted} more do not fit the context of "
                f"{context}: shorten the prompt, ask for fewer, or load with a larger context"
            )
        return context - n_prompt if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True)
class Timings:
    """Where a completion's time went. Seconds, and tokens each second.

    prompt_tokens: all of the prompt; cached_tokens: those of it found in the cache.
    prompt_seconds: from the first step for this prompt to its first token.
    decode_tokens: tokens after the first, made in decode_seconds.
    time_to_first_token: from when the request was added; None if there was none.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    time_to_first_token: float | None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed over the tokens that had to be computed; 0 when nothing was measured."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """0 when fewer than two tokens were made."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    tokens: the ids generated, without the end token or stop id that ended them; those of a stop
    string are there, though not in ``text``. logprobs: one an id, when asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
