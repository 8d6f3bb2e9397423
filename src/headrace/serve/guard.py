"""What every request passes before a route sees it, and what is written down of it.

In this order: a known Host, a known Origin, a key, room, a complete body within its limits of size
and time that is strict JSON. When the client goes away, what was begun for it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.serve.checks import check_host, check_json, check_key, check_origin, check_size
from headrace.serve.exchange import EXCHANGE, Exchange
from headrace.serve.problems import Problem, server_error, unavailable
from headrace.serve.service import Service

logger = logging.getLogger("headrace.serve")

_OPEN_ROUTES = ("/health/live",)
"""Those that need no key, and are answered however full the server is."""
_CORS_METHODS = "GET, POST, OPTIONS"
_CORS_HEADERS = "authorization, content-type"


class Guard:
    """An ASGI application around another. Errors become OpenAI's error objects."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange(scope, send)
        self._service.exchanges.add(exchange)
        try:
            await self._answer(scope, receive, exchange)
        except Problem as problem:
            await exchange.fail(problem, scope, receive)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if exchange.ended_by is None or task is None:
                raise
            task.uncancel()
            await exchange.fail(exchange.ended_by, scope, receive)
        except Exception:
            logger.exception("an error of the server's own")
            await exchange.fail(server_error(), scope, receive)
        finally:
            self._service.exchanges.discard(exchange)
            exchange.close()
            self._record(scope, exchange)

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        if not await self._admit(scope, exchange):
            return
        body = await self._read(scope, receive)
        watcher = asyncio.create_task(exchange.watch(receive))
        try:
            await self._app(scope, _replay(body, receive), exchange.send)
        finally:
            watcher.cancel()

    async def _admit(self, scope: Scope, exchange: Exchange) -> bool:
        """Check who asks. False when the answer, to a preflight, has been sent."""
        headers, settings = Headers(scope=scope), self._settings
        host = _only_one(headers, "host") or ""
        check_host(host, settings)
        origin = _only_one(headers, "origin")
        if origin is not None and check_origin(origin, host, settings):
            exchange.headers += _cors(origin)
            if scope["method"] == "OPTIONS":
                await exchange.send({"type": "http.response.start", "status": 204})
                await exchange.send({"type": "http.response.body"})
                return False
        if scope["path"] in _OPEN_ROUTES:
            return True
        if settings.api_keys:
            check_key(headers, settings.api_keys, browser=scope["path"] == "/")
        connection = exchange.connection
        if connection is not None and connection.n_open > settings.max_connections:
            full = unavailable("too many connections are open", "too_many_connections")
            full.headers["Connection"] = "close"
            raise full
        return True

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem: too large, too slow, of another type, not strict JSON."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        headers, limit = Headers(scope=scope), self._settings.max_body
        check_size(headers.get("content-length", "0"), limit)
        body = bytearray()
        seconds = self._settings.body_timeout
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(499, "the client has gone", code="disconnected")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    check_size(str(len(body)), limit)
        except TimeoutError:
            # The rest of the body is not read: the connection cannot go on.
            raise Problem(408, f"the body did not arrive within {seconds:g} s", code="timeout",
                          headers={"Connection": "close"}) from None  # fmt: skip
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "the body must be application/json", code="invalid_type")
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise Problem(415, "the body must not be compressed", code="invalid_type")
            check_json(bytes(body), limit)
        return bytes(body)

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        """Metrics and a line of the log: counts and times, no text."""
        seconds = time.perf_counter() - exchange.started
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.observe_request(route, exchange.status, seconds)
        facts: dict[str, Any] = {
            "id": exchange.id,
            "client": (scope.get("client") or ("unknown",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": exchange.status,
            "ms": round(1000 * seconds, 1),
            **exchange.as_log(),
        }
        quiet = route in ("/health/live", "/health/ready", "/metrics")
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": facts})


def _only_one(headers: Headers, name: str) -> str | None:
    """A 400 when there are two: proxies and servers differ in which of them counts."""
    given = headers.getlist(name)
    if len(given) > 1:
        raise Problem(400, f"there are {len(given)} {name} headers", code="invalid_header")
    return given[0] if given else None


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
        (b"access-control-allow-methods", _CORS_METHODS.encode()),
        (b"access-control-allow-headers", _CORS_HEADERS.encode()),
        (b"vary", b"Origin"),
    ]


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for the application: the body that was read, then what comes after it."""
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
