"""The one thread that touches the model, and its door to the event loop.

Requests go in from the loop and their events come back to it, one batch a step. The thread also
loads the model, so that the server answers probes meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

from headrace.api import Model
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.engine.sequence import Event, Sequence
from headrace.serve.metrics import Metrics
from headrace.serve.problems import busy, unavailable

logger = logging.getLogger("headrace.serve")

State = Literal["loading", "ready", "draining", "failed"]
Work = Iterator[Any]
"""Work in pieces, each short enough to run between two steps; its last value is the result."""


class Stream:
    """The events of one sequence on their way to whoever waits for them in the loop."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.events: deque[Event] = deque()
        self.sequence: Sequence | None = None
        self.ended = False
        self._wake = wake

    def push(self, event: Event) -> None:
        self.events.append(event)
        self.ended = event.finish_reason is not None
        self._wake()


class EngineThread:
    """Owns the model from :meth:`start` to :meth:`close`. All methods belong to the loop's thread.

    load: makes the model. capacity: most requests running and waiting together.
    :attr:`on_state` is called in the loop when the model is ready or has failed.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        capacity: int,
        metrics: Metrics,
    ) -> None:
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.in_flight = 0
        self.on_state: Callable[[], None] = lambda: None
        self._load, self._metrics = load, metrics
        self._capacity = capacity
        self._model: Model | None = None
        self._outbox: deque[tuple[Stream, Event]] = deque()
        self._works: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def model(self) -> Model:
        """The model; a 503 while there is none."""
        if self.state == "loading":
            raise unavailable("the model is loading: try again in a moment", "loading", 2)
        if self.state == "draining":
            raise unavailable("the server is shutting down", "shutting_down", 5)
        if self.state == "failed" or self._model is None:
            raise unavailable("the engine has failed: the server is ending", "failed", 5)
        return self._model

    @property
    def engine(self) -> Engine | None:
        return self._model.engine if self._model is not None else None

    def reserve(self, n: int) -> None:
        """Room for ``n`` more requests; a 429 when the queue is full."""
        if self.in_flight + n > self._capacity:
            seconds = self._metrics.mean_completion_seconds() or 1.0
            raise busy(
                f"the queue is full: {self.in_flight} requests are running or waiting",
                retry_after=max(1, min(60, round(seconds))),
            )
        self.in_flight += n

    def unreserve(self, n: int) -> None:
        """Give back room that was reserved and is not needed."""
        self.in_flight -= n

    def submit(self, request: Request, stream: Stream) -> None:
        """Queue ``request``, for which room was reserved. Raises what :meth:`Engine.add` does."""
        engine = self.model.engine
        mask = request.mask
        prefetch = getattr(mask, "prefetch", None)

        def sink(event: Event) -> None:
            if prefetch is not None and event.token is not None and event.finish_reason is None:
                prefetch(event.token)
            self._outbox.append((stream, event))

        stream.sequence = engine.add(request, sink)
        self._wake.set()

    def cancel(self, stream: Stream) -> None:
        """End a stream's request, and free its pages, now or when the running step ends."""
        if stream.sequence is not None and not stream.ended and self._model is not None:
            self._model.engine.cancel(stream.sequence)
            self._wake.set()  # an idle engine takes what was added, and ends it
            self._drain()

    async def run(self, work: Work) -> Any:
        """The last value of ``work``, which runs a piece at a time between steps."""
        if len(self._works) >= self._capacity:
            raise busy("the queue is full", retry_after=1)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._works.append((work, future))
        self._wake.set()
        return await future

    async def close(self) -> None:
        """Cancel everything, and release the model."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)
        self._drain()

    # In the engine's thread

    def _run(self) -> None:
        try:
            self._model = model = self._load()
        except BaseException as error:
            self._enter("failed", error)
            return
        try:
            self._enter("ready")
            self._serve(model.engine)
        except BaseException as error:  # the engine answers for each request's errors; this is ours
            logger.exception("the engine failed")
            self._enter("failed", error)
        finally:
            model.close()
            self._post()
            ended = unavailable("the engine has ended", "failed")
            for work, future in self._works:
                work.close()  # type: ignore[attr-defined]
                self._call_loop(functools.partial(_settle, future, None, ended))

    def _serve(self, engine: Engine) -> None:
        while not self._closing:
            self._wake.clear()
            start = time.perf_counter()
            stepped = engine.step()
            if stepped:
                self._metrics.step_seconds.observe(time.perf_counter() - start)
            self._post()
            if not self._run_piece() and not stepped:
                self._wake.wait()

    def _run_piece(self) -> bool:
        """One piece of the first work; False when there is none."""
        if not self._works:
            return False
        work, future = self._works[0]
        if future.cancelled():
            work.close()  # type: ignore[attr-defined]
            self._works.popleft()
            return True
        try:
            value = next(work)
        except Exception as error:
            self._works.popleft()
            self._call_loop(functools.partial(_settle, future, None, error))
            return True
        if value is not None:
            self._works.popleft()
            self._call_loop(functools.partial(_settle, future, value, None))
        return True

    def _post(self) -> None:
        if self._outbox:
            self._call_loop(self._drain)

    def _enter(self, state: State, error: BaseException | None = None) -> None:
        def enter() -> None:
            if self.state != "draining" or state == "failed":
                self.state = state
            self.error = error
            self.on_state()

        self._call_loop(enter)

    def _call_loop(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop has gone; nobody waits for this
            logger.debug("the event loop has ended before the engine")

    # In the loop's thread

    def _drain(self) -> None:
        while self._outbox:
            stream, event = self._outbox.popleft()
            if stream.ended:
                continue
            stream.push(event)
            if stream.ended:
                self.in_flight -= 1
                self._metrics.observe_completion(event.sequence)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
