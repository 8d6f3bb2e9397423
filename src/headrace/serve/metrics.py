"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from headrace.engine.engine import Engine
    from headrace.engine.sequence import Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One registry a server, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "headrace_requests", "Answers, by route and status.", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "headrace_request_seconds", "From a request's arrival to the end of its answer.",
            ["route"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "headrace_first_token_seconds", "From a completion's queueing to its first token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.token_seconds = Histogram(
            "headrace_token_seconds", "Between the tokens of a completion, on average.",
            buckets=_STEP_SECONDS, registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "headrace_step_seconds", "One step of the engine.",
            buckets=_STEP_SECONDS, registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "headrace_tokens", "Tokens: of prompts, those found in the cache, and generated.",
            ["kind"], registry=registry,
        )  # fmt: skip
        self.completions = Counter(
            "headrace_completions", "Completions, by how they ended.", ["finish_reason"],
            registry=registry,
        )  # fmt: skip
        self._n_completions, self._seconds = 0, 0.0

    def watch(self, engine: Callable[[], Engine | None], in_flight: Callable[[], int]) -> None:
        """Report the engine's own state whenever the metrics are read."""
        self.registry.register(_EngineState(engine, in_flight))

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def observe_completion(self, sequence: Sequence) -> None:
        """Count a sequence that has ended, in whatever way."""
        timings = sequence.timings
        self.completions.labels(str(sequence.finish_reason)).inc()
        self.tokens.labels("prompt").inc(timings.prompt_tokens)
        self.tokens.labels("cached").inc(timings.cached_tokens)
        self.tokens.labels("generated").inc(sequence.n_generated)
        if timings.time_to_first_token is not None:
            self.first_token_seconds.observe(timings.time_to_first_token)
        if timings.decode_tokens:
            self.token_seconds.observe(timings.decode_seconds / timings.decode_tokens)
        self._n_completions += 1
        self._seconds += timings.prompt_seconds + timings.decode_seconds

    def mean_completion_seconds(self) -> float | None:
        """How long completions have taken so far, on average."""
        return self._seconds / self._n_completions if self._n_completions else None

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineState(Collector):
    def __init__(self, engine: Callable[[], Engine | None], in_flight: Callable[[], int]) -> None:
        self._engine, self._in_flight = engine, in_flight

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        yield GaugeMetricFamily("headrace_ready", "1 when a model is loaded.", float(bool(engine)))
        if engine is None:
            return
        requests = GaugeMetricFamily(
            "headrace_sequences", "Completions running, waiting, and in all.", labels=["state"]
        )
        requests.add_metric(["running"], engine.n_running)
        requests.add_metric(["waiting"], engine.n_waiting)
        requests.add_metric(["in_flight"], self._in_flight())
        yield requests
        pages = GaugeMetricFamily(
            "headrace_kv_pages", "KV pages: held by sequences, cached, free.", labels=["state"]
        )
        pool = engine.pool
        pages.add_metric(["held"], pool.n_held)
        pages.add_metric(["cached"], pool.n_cached)
        pages.add_metric(["free"], pool.n_free)
        yield pages
        yield CounterMetricFamily(
            "headrace_preemptions", "Sequences that gave their pages up.",
            engine.scheduler.n_preempted,
        )  # fmt: skip
