"""What every request passes before a route sees it, and what is written down of it.

In this order: a known Host, a known Origin, a key, a complete body within its limits of size and
time that is strict JSON. Each answer goes out within the write timeout, or its connection is cut.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.serve.problems import Problem
from headrace.serve.service import Service
from headrace.serve.settings import Settings

logger = logging.getLogger("headrace.serve")

MAX_DEPTH = 200
"""Levels of arrays and objects in a body."""

_OPEN_ROUTES = ("/health/live",)
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
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
        exchange = _Exchange(scope, send, self._settings.write_timeout)
        try:
            if await self._admit(scope, exchange):
                body = await self._read(scope, receive)
                await self._app(scope, _replay(body, receive), exchange.send)
        except Problem as problem:
            await exchange.fail(problem, scope, receive)
        except Exception:
            logger.exception("an error of the server's own")
            failed = Problem(500, "the server failed; its log says why", code="internal_error")
            await exchange.fail(failed, scope, receive)
        finally:
            self._record(scope, exchange)

    async def _admit(self, scope: Scope, exchange: _Exchange) -> bool:
        """Check who asks. False when the answer, to a preflight, has been sent."""
        headers = Headers(scope=scope)
        check_host(headers.get("host"), self._settings)
        origin = headers.get("origin")
        if origin is not None:
            foreign = check_origin(origin, headers["host"], self._settings)
            if foreign:
                exchange.headers += _cors(origin)
                if scope["method"] == "OPTIONS":
                    await exchange.send({"type": "http.response.start", "status": 204})
                    await exchange.send({"type": "http.response.body"})
                    return False
        if self._settings.api_keys and scope["path"] not in _OPEN_ROUTES:
            check_key(headers, self._settings.api_keys, browser=scope["path"] == "/")
        return True

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem: too large, too slow, of another type, not strict JSON."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        headers = Headers(scope=scope)
        limit = self._settings.max_body
        too_large = Problem(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(499, "the client has gone", code="disconnected")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            seconds = self._settings.body_timeout
            raise Problem(
                408, f"the body did not arrive within {seconds:g} s", code="timeout"
            ) from None
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "the body must be application/json", code="invalid_type")
            check_json(bytes(body))
        return bytes(body)

    def _record(self, scope: Scope, exchange: _Exchange) -> None:
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
        }
        if (noted := scope.get("headrace.log")) is not None:
            facts |= noted["generation"].as_log()
            if noted["user"]:
                facts["user"] = noted["user"]
        if exchange.code:
            facts["error"] = exchange.code
        quiet = route in ("/health/live", "/health/ready", "/metrics")
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": facts})


class _Exchange:
    """The answer to one request: adds headers, bounds each write, remembers how it went."""

    def __init__(self, scope: Scope, send: Send, write_timeout: float) -> None:
        self.id = f"req_{uuid.uuid4().hex[:20]}"
        self.started = time.perf_counter()
        self.status = 499  # until something else is sent
        self.code: str | None = None
        self.headers: list[tuple[bytes, bytes]] = [*_SECURITY, (b"x-request-id", self.id.encode())]
        self._send, self._timeout = send, write_timeout
        self._abort = scope.get("extensions", {}).get("headrace.abort")
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except TimeoutError:
            self.code = "write_timeout"
            if self._abort is not None:
                self._abort()
            raise Problem(499, "the client has stopped reading", code="write_timeout") from None

    async def fail(self, problem: Problem, scope: Scope, receive: Receive) -> None:
        """Answer with ``problem``, unless an answer has begun or nobody is there."""
        self.code = problem.code
        if self._begun or problem.status == 499:
            return
        if problem.status in (408, 413):  # the rest of the body is not read
            problem.headers["Connection"] = "close"
        await problem.response()(scope, receive, self.send)


def check_host(given: str | None, settings: Settings) -> None:
    """A 403 for a Host that is not ours: a page elsewhere has made a name point here."""
    name = _host_name(given or "")
    if "*" in settings.allowed_hosts or name in settings.allowed_hosts or name == settings.host:
        return
    if name == "localhost":
        return
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        address = None
    # No name points at a literal address; one that is not the loopback's came over the network.
    if address is not None and (address.is_loopback or not settings.is_loopback):
        return
    raise Problem(403, "this Host is not served here: see --allowed-hosts", code="host_not_allowed")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_origin(origin: str, host: str, settings: Settings) -> bool:
    """Whether ``origin`` is another one that is allowed; False for our own page. Else a 403."""
    if origin in (f"http://{host}", f"https://{host}"):
        return False
    if "*" in settings.allowed_origins or origin in settings.allowed_origins:
        return True
    raise Problem(
        403, "pages of this Origin may not ask here: see --allowed-origins",
        code="origin_not_allowed",
    )  # fmt: skip


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
        (b"access-control-allow-methods", _CORS_METHODS.encode()),
        (b"access-control-allow-headers", _CORS_HEADERS.encode()),
        (b"vary", b"Origin"),
    ]


def check_key(headers: Headers, keys: Iterable[str], *, browser: bool) -> None:
    """A 401 unless ``Authorization`` holds one of ``keys``, as a bearer token or the password of
    the browser's own dialogue (Basic), which is how the chat page asks for it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            given = ""
    elif scheme.lower() != "bearer":
        given = ""
    # Every key is compared, each in constant time: the time taken tells nothing.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    if not any(matches):
        challenge = 'Basic realm="headrace", charset="UTF-8"' if browser else "Bearer"
        raise Problem(
            401, "a valid API key is needed: send 'Authorization: Bearer <key>'",
            code="invalid_api_key", headers={"WWW-Authenticate": challenge},
        )  # fmt: skip


def check_json(body: bytes) -> None:
    """A 400 unless ``body`` is an object in JSON, with no NaN, shallow, and all of it text."""

    def refuse(constant: str) -> None:
        raise Problem(400, f"the body holds {constant}, which is not JSON", code="invalid_json")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        raise Problem(400, "the body holds a lone surrogate, which is no character",
                      code="invalid_json") from None  # fmt: skip
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of 5,000 digits
        where = getattr(error, "pos", None)
        at = f" at character {where}" if where is not None else ""
        raise Problem(400, f"the body is not JSON{at}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body must be a JSON object", code="invalid_json")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for group in children for v in group if isinstance(v, (dict, list))]
        if not level:
            return
    raise Problem(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


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
