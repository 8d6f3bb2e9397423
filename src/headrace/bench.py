"""How fast a model runs, beside how fast this machine can read memory.

Decoding a token reads every weight once, so the machine's read bandwidth is its ceiling; the share
of it that decoding reaches is the figure to look at. Both are measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import CACHED_BYTES, PAGE_SIZE, Batch, DecodeRow, DecodingRunner, Runner
from headrace.errors import RequestError
from headrace.model.decoder import Decoder
from headrace.model.operations import Embed, Head
from headrace.sampling import SamplingParams

CHUNK_ROWS = 512
"""Rows of a prompt that go through the model in one step, as in llama.cpp's default."""

_READ_BYTES = 512 << 20  # well over any last-level cache


@dataclass(frozen=True)
class Measurement:
    """One test: ``seconds`` holds the repetitions, each of ``n_tokens`` tokens at ``depth``.

    ``n_bytes`` is what one repetition must read at least: weights once a step, and keys and values.
    """

    test: str
    n_tokens: int
    depth: int
    seconds: tuple[float, ...]
    n_bytes: int

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """(mean, standard deviation) over the repetitions, as llama-bench gives them."""
        rates = [self.n_tokens / s for s in self.seconds]
        return statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.n_bytes / statistics.fmean(self.seconds)

    def as_json(self, read_bandwidth: float) -> dict[str, Any]:
        mean, deviation = self.tokens_per_second
        return {
            **asdict(self),
            "tokens_per_second": mean,
            "tokens_per_second_stddev": deviation,
            "tokens_per_second_median": self.n_tokens / statistics.median(self.seconds),
            "gb_per_second": self.bytes_per_second / 1e9,
            "bandwidth_share": self.bytes_per_second / read_bandwidth,
        }


def weight_bytes_per_step(decoder: Decoder) -> int:
    """Bytes of weights that one step of one row reads: all of them, of the embedding one row."""
    total = sum(tensor.n_bytes for tensor in decoder.weights.values())
    embed = next(op for op in decoder.operations if isinstance(op, Embed))
    head = next(op for op in decoder.operations if isinstance(op, Head))
    table = decoder.weights[embed.weight]
    if head.out.weight != embed.weight:
        total -= table.n_bytes
    return total + table.qtype.row_bytes(table.k)


def kv_bytes_per_position(decoder: Decoder, cache_type: str = "f16") -> int:
    """Bytes of the keys and values of one position, in all layers."""
    config = decoder.config
    values = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return int(values * CACHED_BYTES[cache_type])


class StepTimer:
    """Times prefill and decode steps of a loaded model, without sampling (greedy argmax only).

    ``context``: the positions to make room for. Raises RequestError when the model has fewer.
    """

    def __init__(self, runner: Runner, context: int) -> None:
        limit = runner.decoder.config.context_length
        if context > limit:
            raise RequestError(
                f"the test needs {context} positions, the model has a context of {limit}"
            )
        n_pages = -(-context // PAGE_SIZE)
        runner.allocate_cache(n_pages)
        self.decoder = runner.decoder
        self.runner = runner
        self._page_table = np.arange(n_pages, dtype=np.int32)[None, :]
        self._random = np.random.default_rng(0)

    def fill(self, depth: int) -> None:
        """Bring ``depth`` positions of random tokens into the cache."""
        self._prompt(0, depth)

    def prefill(self, n_tokens: int, depth: int = 0) -> float:
        """Seconds for a prompt of ``n_tokens`` after ``depth`` positions already cached."""
        start = time.perf_counter()
        self._prompt(depth, n_tokens)
        return time.perf_counter() - start

    def decode(self, n_tokens: int, depth: int = 0) -> float:
        """Seconds for ``n_tokens`` single-token steps after ``depth`` cached positions.

        On a device that chooses tokens itself they are one burst, as in generating.
        """
        token = int(self._random.integers(self.decoder.config.n_vocab))
        runner = self.runner
        start = time.perf_counter()
        if isinstance(runner, DecodingRunner):
            # What the cached positions hold does not matter, how many they are does.
            tokens, pages = [0] * depth + [token], self._page_table[0].tolist()
            greedy = SamplingParams(temperature=0)
            for _ in runner.decode([DecodeRow(tokens, pages, depth + 1, greedy, 0)], n_tokens):
                pass
            return time.perf_counter() - start
        for position in range(depth, depth + n_tokens):
            logits = self._step(np.array([token], np.int32), position)
            token = int(logits.argmax())
        return time.perf_counter() - start

    def _prompt(self, start: int, n_tokens: int) -> None:
        tokens = self._random.integers(self.decoder.config.n_vocab, size=n_tokens)
        for done in range(0, n_tokens, CHUNK_ROWS):
            self._step(tokens[done : done + CHUNK_ROWS].astype(np.int32), start + done)

    def _step(self, tokens: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        n = len(tokens)
        return self.runner.step(
            Batch(
                tokens=tokens,
                positions=np.arange(position, position + n, dtype=np.int32),
                slots=np.zeros(n, np.int32),
                page_table=self._page_table,
                logit_rows=np.array([n - 1], np.int32),
            )
        )


def measure(
    timer: StepTimer,
    prompts: Sequence[int],
    generate: Sequence[int],
    depths: Sequence[int],
    repetitions: int,
    cache_type: str = "f16",
) -> list[Measurement]:
    """Prefill of each length in ``prompts`` and decode of each in ``generate``, at each depth.

    Every test runs once unmeasured first. The timer's context must hold the longest at the deepest.
    """
    weights = weight_bytes_per_step(timer.decoder)
    kv = kv_bytes_per_position(timer.decoder, cache_type)
    results = []
    for depth in depths:
        timer.fill(depth)
        for n in prompts:
            timer.prefill(n, depth)
            seconds = tuple(timer.prefill(n, depth) for _ in range(repetitions))
            steps = -(-n // CHUNK_ROWS)
            results.append(_measurement("pp", n, depth, seconds, steps * weights))
        for n in generate:
            timer.decode(1, depth)
            seconds = tuple(timer.decode(n, depth) for _ in range(repetitions))
            positions_read = sum(range(depth + 1, depth + n + 1))
            results.append(_measurement("tg", n, depth, seconds, n * weights + kv * positions_read))
    return results


def _measurement(
    kind: str, n: int, depth: int, seconds: tuple[float, ...], n_bytes: int
) -> Measurement:
    test = f"{kind}{n}" + (f" @ d{depth}" if depth else "")  # llama-bench's notation
    return Measurement(test, n, depth, seconds, n_bytes)


class ReadBandwidth:
    """The best bytes a second that plain reading of the runner's memory has reached so far.

    ``threads``: that read on a CPU; None for a device, which reads by itself.
    """

    def __init__(self, runner: Runner, threads: int | None) -> None:
        device_read: Callable[[], float] | None = getattr(runner, "read_bandwidth", None)
        n_threads = threads or os.cpu_count() or 1
        self.threads = None if device_read else n_threads
        self._read = device_read or partial(read_bandwidth, n_threads)
        self.best = 0.0

    def measure(self) -> None:
        self.best = max(self.best, self._read())


def decode_work(timer: StepTimer, n_tokens: int = 32) -> dict[str, float] | None:
    """What a device is asked to do for one token: launches, synchronisations and bytes moved either
    way, by the counters of a runner that has them (``cuda.device.Counters``)."""
    counters = getattr(timer.runner, "counters", None)
    if counters is None:
        return None
    timer.decode(n_tokens)
    before = asdict(counters)
    timer.decode(n_tokens)
    return {name: (value - before[name]) / n_tokens for name, value in asdict(counters).items()}


def read_bandwidth(threads: int, passes: int = 8) -> float:
    """Bytes a second that ``threads`` threads read from memory together: the best of ``passes``."""
    checksum = _checksum()
    parts = np.array_split(np.ones(_READ_BYTES // 8, np.uint64), 16 * threads)
    checksum(parts[0][:8])  # compile
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(checksum, parts))
            best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best


def _checksum() -> Any:
    """A compiled loop over uint64 that does nothing but read; it runs outside the GIL."""
    import numba

    @numba.njit(nogil=True)
    def checksum(values: NDArray[np.uint64]) -> np.uint64:
        result = np.uint64(0)
        for i in range(values.size):
            result ^= values[i]
        return result

    return checksum
