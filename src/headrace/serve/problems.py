"""Errors as OpenAI's clients expect them: a status and ``{"error": {message, type, param, code}}``.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from headrace.errors import (
    ContextOverflowError,
    DeviceMemoryError,
    HeadraceError,
    RequestError,
    TemplateError,
    TokenizerError,
)
from headrace.sampling import SamplingParams

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_MAX_MESSAGE = 500
_NAMED = {*SamplingParams.__dataclass_fields__, "stop", "max_tokens", "response_format", "tools",
          "text"}  # fmt: skip
"""Fields that the library's messages begin with."""
_NOT_FIELDS = {"body", "query", "path", "str", "int", "float", "bool", "none"}
"""Parts of pydantic's error places that are no names of fields: sources, and members of unions."""


class Problem(Exception):  # noqa: N818  # what clients are told, not what went wrong here
    """A request that ends in an error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = str(self)[:_MAX_MESSAGE].encode(errors="replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def busy(message: str, retry_after: int) -> Problem:
    headers = {"Retry-After": str(retry_after)}
    return Problem(429, message, code="queue_full", headers=headers)


def unavailable(message: str, code: str, retry_after: int = 1) -> Problem:
    return Problem(503, message, code=code, headers={"Retry-After": str(retry_after)})


def server_error() -> Problem:
    return Problem(500, "the server failed; its log says why", code="internal_error")


def from_error(error: HeadraceError, param: str | None = None) -> Problem:
    """What a library error is to a client. ``param``: the field it is about, unless it says so."""
    message = str(error)
    if isinstance(error, ContextOverflowError):
        return Problem(400, message, param=param, code="context_length_exceeded")
    if isinstance(error, RequestError):
        named = re.match(r"([a-z_]+)(?:\[\d+\])?(?:: | must )", message)
        if named and named[1] in _NAMED:
            param = named[1]
        return Problem(400, message, param=param, code="invalid_value")
    if isinstance(error, (TemplateError, TokenizerError)):
        return Problem(400, message, param=param, code="invalid_value")
    if isinstance(error, DeviceMemoryError):
        return unavailable(message, "out_of_memory", retry_after=5)
    return Problem(500, message, code="device_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of pydantic's errors as a 400 that names the field; values are not repeated."""
    first = errors[0].get("loc", ())[:2]
    # Of a union, each member has an error: the one that got furthest says most.
    same = [error for error in errors if error.get("loc", ())[:2] == first]
    error = max(same, key=lambda error: len(error.get("loc", ())))
    place = [part for part in error.get("loc", ()) if part not in _NOT_FIELDS]
    param = ""
    for part in place:
        if isinstance(part, int):
            param += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part):
            param += f".{part}" if param else part
    if error.get("type") == "extra_forbidden":
        shown = param or "a field"
        return Problem(400, f"{shown} is not supported", param=param or None, code="unsupported")
    message = str(error.get("msg", "invalid")).removeprefix("Value error, ")
    return Problem(
        400, f"{param}: {message}" if param else message, param=param or None, code="invalid_value"
    )
