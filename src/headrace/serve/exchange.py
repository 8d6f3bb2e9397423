"""One request and its answer, which can be ended at any time."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any, Protocol

from starlette.types import Message, Receive, Scope, Send

from headrace.serve.problems import Problem

CONNECTION = "headrace.connection"
"""The extension of a scope that holds its :class:`Connection`."""

EXCHANGE = "headrace.exchange"
"""The key of a scope that holds its :class:`Exchange`."""

_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class Connection(Protocol):
    """What the server knows of a connection besides what ASGI says."""

    timed_out: bool
    """It was cut because the client had stopped reading."""

    @property
    def n_open(self) -> int:
        """Connections of the server."""


class Work(Protocol):
    """What an exchange waits for: a :class:`~headrace.serve.generation.Generation`."""

    def abort(self, problem: Problem) -> None: ...
    def cancel(self) -> None: ...
    def as_log(self) -> dict[str, object]: ...


class Exchange:
    """Adds headers to the answer, remembers how it went. Made in the task that answers."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = f"req_{uuid.uuid4().hex[:20]}"
        self.started = time.perf_counter()
        self.status = 499  # until something else is sent
        self.code: str | None = None
        self.headers: list[tuple[bytes, bytes]] = [*_SECURITY, (b"x-request-id", self.id.encode())]
        self.connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
        self.ended_by: Problem | None = None
        self._facts: dict[str, Any] = {}
        self._work: Work | None = None
        self._send = send
        self._begun = self._complete = False
        self._task = asyncio.current_task()

    def note(self, user: str | None, work: Work | None = None, **facts: Any) -> None:
        """For the log: who asks, and counts, never text. ``work`` ends when this does."""
        self._facts = {**facts, "user": user} if user else facts
        self._work = work

    def end(self, problem: Problem) -> None:
        """End it now: with ``problem`` for its answer, or as an event if it is a stream."""
        if self._complete or self.ended_by is not None:
            return
        if self._begun and problem.status != 499:
            if self._work is not None:
                self._work.abort(problem)
            return
        self.ended_by = problem
        if self._task is not None:
            self._task.cancel()

    async def watch(self, receive: Receive) -> None:
        """End it when the client goes away. The body must have been received."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if self.connection is not None and self.connection.timed_out:
            self.end(Problem(499, "the client has stopped reading", code="write_timeout"))
        self.end(Problem(499, "the client has gone", code="disconnected"))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, problem: Problem, scope: Scope, receive: Receive) -> None:
        """Answer with ``problem``, unless an answer has begun or nobody is there."""
        self.code = problem.code
        if self._begun or problem.status == 499:
            return
        await problem.response()(scope, receive, self.send)

    def close(self) -> None:
        """Whatever happened: nothing goes on."""
        if self._work is not None:
            self._work.cancel()

    def as_log(self) -> dict[str, Any]:
        facts = self._work.as_log() if self._work is not None else {}
        facts |= self._facts
        return facts | {"error": self.code} if self.code else facts
