"""Constrained decoding: JSON schemas and tool calls as masks over the vocabulary, by llguidance.

A grammar from a client is compiled twice, never in the engine's thread: first in a child process
that may crash or run out of time (``grammar_worker``), then here. Compiled grammars are kept: most
clients send the same few. Masks are computed in a thread of their own while the model runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import RequestError
from headrace.serve.problems import Problem, busy
from headrace.text.tokenizer import Tokenizer

_WORKER = Path(__file__).with_name("grammar_worker.py")
_WALL_SECONDS = 20.0
_MAX_KEPT = 64
_MAX_WAITING = 64
_MAX_GRAMMAR = 1 << 20
_STACK_BYTES = 64 << 20  # eight times the child's, of which only what is used takes memory
_LIMITS: Mapping[str, Any] = {"step_lexer_fuel": 100_000, "step_max_items": 25_000,
                              "verbose_errors": False}  # fmt: skip
"""A mask then takes 10 ms at the very most: beyond that the request fails."""

JSON_OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""JSON as ``json.dumps`` writes it: a small model left to it would write white space for ever."""


def json_grammar(schema: Mapping[str, Any], param: str) -> str:
    """The grammar of the JSON values that ``schema`` allows. Problem (400) when it is none."""
    try:
        return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}]})
    except (RecursionError, ValueError) as error:
        raise _refused(f"it cannot be read: {error}", param) from None


class Grammars:
    """Compiles grammars for one vocabulary, and keeps those used last. Belongs to the loop, but
    for :meth:`prepare`, which comes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._vocabulary: Any = None
        self._turn = asyncio.Semaphore(2)
        self._n_waiting = 0
        # Two threads: what takes long to compile must not keep the masks of others waiting.
        self._compiler, self._masks = _Thread("headrace-grammar"), _Thread("headrace-mask")

    async def mask(self, grammar: str, n_vocab: int, param: str) -> Mask:
        """A fresh mask for one completion. Problem: a grammar that does not compile (400), or too
        many that are to be compiled (429)."""
        if self._vocabulary is None:
            raise _refused("this model has no token that would end the answer", param)
        if len(grammar) > _MAX_GRAMMAR:
            raise _refused(f"more than {_MAX_GRAMMAR >> 20} MiB", param)
        if grammar not in self._kept:
            if self._n_waiting >= _MAX_WAITING:
                raise busy("too many new schemas are to be compiled", retry_after=5)
            self._n_waiting += 1
            try:
                async with self._turn:
                    if grammar not in self._kept:  # another request may have brought it
                        await self._compile(grammar, param)
            finally:
                self._n_waiting -= 1
        self._kept.move_to_end(grammar)
        return Mask(self._masks.submit, self._kept[grammar].deep_copy, n_vocab, param)

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Build what all grammars share. Takes a while: call it while the model loads."""
        if tokenizer.end_ids:
            self._vocabulary = _vocabulary(tokenizer)

    def close(self) -> None:
        self._compiler.close()
        self._masks.close()

    async def _compile(self, grammar: str, param: str) -> None:
        await _check(grammar, param)
        work = self._compiler.submit(lambda: _compile(self._vocabulary, grammar))
        matcher = await asyncio.wrap_future(work)
        if matcher.is_error():
            raise _refused(matcher.get_error(), param)
        self._kept[grammar] = matcher
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)


async def _check(grammar: str, param: str) -> None:
    """Try ``grammar`` in a child process. Problem (400) when it does not compile."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(_WORKER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH")
             if name in os.environ},
    )  # fmt: skip
    request = json.dumps({"grammar": grammar, "limits": _LIMITS}).encode()
    try:
        async with asyncio.timeout(_WALL_SECONDS):
            answer, _ = await process.communicate(request)
    except TimeoutError:
        raise _refused(f"it takes more than {_WALL_SECONDS:g} s to compile", param) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise _refused("it is nested too deeply, or takes too much time or memory", param)
    if error := json.loads(answer)["error"]:
        raise _refused(error, param)


class Mask:
    """A :class:`headrace.sampling.LogitsMask` over one matcher.

    The next mask is computed in the background as soon as :meth:`prefetch` tells the token; asked
    without that, it is computed on the spot.
    """

    def __init__(
        self,
        submit: Callable[[Callable[[], Any]], Future[Any]],
        new_matcher: Callable[[], Any],
        n_vocab: int,
        param: str,
    ) -> None:
        """param: the field of the request that asks for it."""
        self._submit, self._new_matcher, self._n_vocab = submit, new_matcher, n_vocab
        self._param = param
        self._matcher: Any = None
        self._n_consumed = 0
        self._next = submit(self._first)

    def __call__(self, generated: Sequence[int]) -> NDArray[np.bool_]:
        """bool [n_vocab]. Raises RequestError when the grammar has become too complex."""
        while self._n_consumed < len(generated):
            self.prefetch(generated[self._n_consumed])
        result: NDArray[np.bool_] = self._next.result()
        return result

    def prefetch(self, token: int) -> None:
        self._n_consumed += 1
        self._next = self._submit(lambda: self._advance(token))

    def _first(self) -> NDArray[np.bool_]:
        self._matcher = self._new_matcher()
        return self._compute()

    def _advance(self, token: int) -> NDArray[np.bool_]:
        self._matcher.consume_token(token)
        return self._compute()

    def _compute(self) -> NDArray[np.bool_]:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            why = _one_line(self._matcher.get_error())
            raise RequestError(f"{self._param}: the constraint failed: {why}")
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        mask = np.zeros(self._n_vocab, np.bool_)
        n = min(len(allowed), self._n_vocab)
        mask[:n] = allowed[:n]
        return mask


class _Thread:
    """One worker with a deep stack. (An executor cannot be given one.)"""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((function, future))
        return future

    def close(self) -> None:
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)


def _vocabulary(tokenizer: Tokenizer) -> Any:
    import llguidance

    class Wrapped:
        eos_token_id = min(tokenizer.end_ids)
        bos_token_id = tokenizer.bos_id
        tokens = tuple(tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab))
        special_token_ids = tuple(i for i in range(tokenizer.n_vocab) if tokenizer.is_control(i))

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode())

    wrapper = llguidance.TokenizerWrapper(Wrapped())
    return llguidance.LLTokenizer(wrapper, eos_token=sorted(tokenizer.end_ids))


def _compile(vocabulary: Any, grammar: str) -> Any:
    import llguidance

    limits = llguidance.LLParserLimits(**_LIMITS)
    return llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)


def _refused(why: str, param: str) -> Problem:
    why = "no text satisfies it" if why.startswith("NoExtension") else _one_line(why)
    return Problem(400, f"{param}: {why}", param=param, code="invalid_schema")


def _one_line(text: str) -> str:
    return " ".join(text.replace("<non-verbose/>", "").split())[:300]
