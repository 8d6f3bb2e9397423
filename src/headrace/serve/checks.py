"""What is checked of a request before a route sees it: pure functions that raise Problem."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from headrace.serve.problems import Problem
from headrace.serve.settings import Settings

MAX_DEPTH = 200
"""Levels of arrays and objects in a body."""

_BYTES_PER_VALUE, _BYTES_PER_CONTAINER = 8, 128
"""A body may hold one value for each 8 bytes of the largest body; one object, array or key for each
128. Millions of empty ones would keep the event loop busy for seconds."""


def check_host(given: str, settings: Settings) -> None:
    """A 403 for a Host that is not ours: a page elsewhere has made a name point here."""
    name = _host_name(given)
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


def check_size(length: str, limit: int) -> None:
    """A 413 for a body of more than ``limit`` bytes. length: as its header says."""
    if not length.isdecimal() or len(length) > 18 or int(length) > limit:
        # The rest of the body is not read: the connection cannot go on.
        raise Problem(413, f"the body is larger than {limit} bytes", code="body_too_large",
                      headers={"Connection": "close"})  # fmt: skip


def check_json(body: bytes, limit: int) -> None:
    """A 400 unless ``body`` is an object in JSON: of not too many values for a body of ``limit``
    bytes, with no NaN, shallow, and all of it text."""
    n_containers = body.count(b"{") + body.count(b"[")
    _check_count(n_containers, limit // _BYTES_PER_CONTAINER, "objects and arrays")
    _check_count(body.count(b":"), limit // _BYTES_PER_CONTAINER, "keys")
    _check_count(body.count(b",") + n_containers, limit // _BYTES_PER_VALUE, "values")

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
    if n_containers > MAX_DEPTH:
        _check_depth(value)


def _check_count(n: int, most: int, what: str) -> None:
    if n > most:
        raise Problem(400, f"the body has {n} {what}, with the signs for them in its texts: more "
                      f"than {most}", code="too_many_values")  # fmt: skip


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for group in children for v in group if isinstance(v, (dict, list))]
        if not level:
            return
    raise Problem(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
