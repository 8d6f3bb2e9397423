"""The server's settings: a file, then the environment, then flags; the last one that speaks counts.

Every setting has one name: ``max_waiting`` is ``max_waiting = 64`` in the file,
``HEADRACE_MAX_WAITING=64`` in the environment and ``--max-waiting 64`` on the command line.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from headrace.backend import CACHED_BYTES
from headrace.errors import RequestError
from headrace.sampling import check_integer, check_real

PREFIX = "HEADRACE_"
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _setting(default: Any, low: float = 0, high: float = 2**31 - 1) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """What the server may be told. RequestError names a value that is wrong.

    Model: model (a path or name), name (the id clients use; default: ``model``, of a path its
    stem), device, threads, context (most tokens of one request), cache_tokens (KV positions of all
    requests together; default: four contexts), max_sequences (that run at once), batch_invariant
    (an answer does not depend on how many others run: on a GPU, slower for few), cache_type (keys
    and values: "f16", or on a GPU "q8_0").

    Network: host, port; allowed_hosts (names besides those of the loopback; "*": all),
    allowed_origins (of web pages on other origins; "*": all); api_keys.

    Limits: max_waiting (requests queued beyond those running, then 429), max_connections,
    max_body (bytes), max_choices (``n`` times prompts), max_inputs (texts of one embeddings
    request); header_timeout, body_timeout (for a request to arrive), write_timeout (for a client
    that has stopped reading), request_timeout (for an answer), drain_timeout (for answers to end at
    shutdown): seconds.

    Log: log_format ("json" or "text"), log_level.
    """

    model: str = ""
    name: str | None = None
    device: str = "auto"
    threads: int | None = _setting(None, 1, 4096)
    context: int | None = _setting(None, 1)
    cache_tokens: int | None = _setting(None, 1, 2**36)
    max_sequences: int = _setting(32, 1, 2**16)
    batch_invariant: bool = False
    cache_type: str = "f16"

    host: str = "127.0.0.1"
    port: int = _setting(8000, 0, 65535)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    max_waiting: int = _setting(64, 0, 2**20)
    max_connections: int = _setting(512, 1, 2**20)
    max_body: int = _setting(4 << 20, 1024, 1 << 30)
    max_choices: int = _setting(16, 1, 1024)
    max_inputs: int = _setting(64, 1, 4096)
    header_timeout: float = _setting(10.0, 0.01, 86400)
    body_timeout: float = _setting(20.0, 0.01, 86400)
    write_timeout: float = _setting(30.0, 0.01, 86400)
    request_timeout: float = _setting(600.0, 0.01, 86400)
    drain_timeout: float = _setting(20.0, 0, 86400)

    log_format: str = "json"
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.model:
            raise RequestError("model is missing: name the model to serve")
        for one in fields(self):
            value = getattr(self, one.name)
            if "low" in one.metadata and value is not None:
                check = check_real if one.type == "float" else check_integer
                low, high = one.metadata["low"], one.metadata["high"]
                object.__setattr__(self, one.name, check(one.name, value, low, high))
        if not isinstance(self.batch_invariant, bool):
            raise RequestError(
                f"batch_invariant must be true or false, not {self.batch_invariant!r}"
            )
        _check_word("cache_type", self.cache_type, tuple(CACHED_BYTES))
        _check_word("log_format", self.log_format, ("json", "text"))
        _check_word("log_level", self.log_level, ("debug", "info", "warning", "error"))
        if not self.is_loopback and not self.api_keys:
            raise RequestError(
                f"host {self.host} lets other machines in: set an API key "
                f"({PREFIX}API_KEYS or --api-key-file), or keep to 127.0.0.1"
            )
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError("api_keys: each needs 8 or more printable ASCII characters")

    @property
    def served_name(self) -> str:
        """The id of the model in requests and answers."""
        return self.name or Path(self.model).name.removesuffix(".gguf")

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK or self.host.startswith("127.")


def load_settings(
    flags: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from ``file`` (TOML), the ``environment`` and ``flags`` (None: not given).

    Raises RequestError for an unknown name or a value that does not fit.
    """
    known = get_type_hints(Settings)
    values: dict[str, Any] = {}
    if file is None and (path := environment.get(PREFIX + "CONFIG")):
        file = Path(path)
    if file is not None:
        values |= _read_file(file, known)
    for name in known:
        if (text := environment.get(PREFIX + name.upper())) is not None:
            values[name] = _parse(PREFIX + name.upper(), text, known[name])
    values |= {name: value for name, value in flags.items() if value is not None}
    return Settings(**values)


def _read_file(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    for name, value in values.items():
        if name not in known:
            raise RequestError(f"{path}: unknown setting {name!r}; see 'headrace serve --help'")
        wants_list = known[name] == tuple[str, ...]
        if wants_list and isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[name] = tuple(value)
        elif wants_list or (known[name] in (str, str | None) and not isinstance(value, str)):
            kind = "a list of strings" if wants_list else "a string"
            raise RequestError(f"{path}: {name} must be {kind}")
    return values


def _parse(name: str, text: str, kind: Any) -> Any:
    """A value from text: numbers for numbers, commas between the items of a list."""
    if kind == tuple[str, ...]:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    if kind in (str, str | None):
        return text
    if kind is bool:
        if (word := text.strip().lower()) in _BOOLEANS:
            return _BOOLEANS[word]
        raise RequestError(f"{name} must be true or false, not {text!r}")
    number = float if kind is float else int
    try:
        return number(text)
    except ValueError:
        raise RequestError(f"{name} must be a number, not {text!r}") from None


def _check_word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
