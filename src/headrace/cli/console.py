"""What people see: progress and notices on stderr, sizes, aligned columns. Answers own stdout."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from headrace import hub
from headrace.errors import RequestError

if TYPE_CHECKING:
    from headrace.api import Model
    from headrace.engine.request import Completion


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resolve(name: str, *, refresh: bool = False) -> Path:
    """:func:`headrace.hub.resolve` with its progress on stderr."""
    with byte_progress("fetching") as progress:
        return hub.resolve(name, progress, refresh=refresh)


@contextmanager
def byte_progress(
    verb: str, after: float = 0.0, begin: Callable[[], None] | None = None
) -> Iterator[hub.Progress]:
    """A bar on a terminal, else a line for every tenth, from ``after`` seconds after the first call
    on, when ``begin`` is called. Costs nothing until then."""
    with ExitStack() as ended:
        show, since = None, None

        def patient(what: str, done: int, total: int) -> None:
            nonlocal show, since
            now = time.monotonic()
            since = now if since is None else since
            if now < since + after:
                return
            if show is None:
                if begin:
                    begin()
                bar = _bar if sys.stderr.isatty() else _line_for_every_tenth
                show = bar(verb, ended)
            show(what, done, total)

        yield patient


def _bar(verb: str, ended: ExitStack) -> hub.Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(f"{verb} {{task.description}}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = ended.enter_context(Progress(*columns, console=Console(stderr=True)))
    task = None

    def show(what: str, done: int, total: int) -> None:
        nonlocal task
        if task is None:
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done)

    return show


def _line_for_every_tenth(verb: str, ended: ExitStack) -> hub.Progress:
    """Not more than one a second, but always the first and the last."""
    said, at = -1, 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal said, at
        tenth, now = 10 * done // total, time.monotonic()
        if tenth > said and (now > at + 1 or tenth == 10):
            said, at = tenth, now
            say(f"{verb} {what}: {10 * tenth}% of {size(total)}")

    return show


class Status:
    """What is going on and for how long, on stderr while it lasts.

    On a terminal one line, drawn once the wait is noticeable and wiped by :meth:`clear` (and at the
    end of the ``with``); elsewhere a line of its own for what takes longer than two seconds.
    """

    def __init__(self) -> None:
        self._what: str | None = None
        self._since = 0.0
        self._drawn = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._terminal = sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        """Say that ``what`` begins."""
        with self._lock:
            self._what, self._since = what, time.monotonic()

    def clear(self) -> None:
        """Nothing is going on: stderr is free for others."""
        with self._lock:
            self._what = None
            if self._drawn and self._terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._draw, name="headrace-status", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.clear()

    def _draw(self) -> None:
        while not self._ended.wait(0.2):
            with self._lock:
                seconds = time.monotonic() - self._since
                if self._what is None or seconds < (0.3 if self._terminal else 2):
                    continue
                if self._terminal:
                    line = f"\r{self._what} … {seconds:.0f} s\x1b[K"
                    print(line, end="", file=sys.stderr, flush=True)
                elif not self._drawn:
                    say(f"{self._what} …")
                self._drawn = True


def load(
    name: str,
    status: Status,
    *,
    device: str = "auto",
    context: int | None = None,
    threads: int | None = None,
    chat: bool = False,
    cache_type: str = "f16",
) -> Model:
    """:func:`headrace.load` for one conversation, with its progress on stderr."""
    path = resolve(name)
    status(f"loading {name} (the first run compiles kernels)")
    import headrace

    with byte_progress("loading", after=1.0, begin=status.clear) as loading:
        model = headrace.load(
            path, device, context=context, threads=threads, chat=chat, max_sequences=1,
            cache_type=cache_type, loading=loading,
        )  # fmt: skip
    status.clear()
    return model


def device_work(model: Model) -> dict[str, object]:
    """What a GPU was asked to do, for ``--json``; nothing on a CPU."""
    return {} if model.counters is None else {"device_work": model.counters}


def write(stream: Iterable[str], status: Status) -> None:
    """The pieces of an answer to stdout as they come, ``status`` cleared before the first."""
    last = "\n"
    try:
        for piece in stream:
            status.clear()
            print(piece, end="", flush=True)
            last = piece
    finally:
        status.clear()
        if not last.endswith("\n"):
            print(flush=True)


def speed(completion: Completion) -> str:
    """``prompt: 36 tokens, 312.0 tok/s; answer: 42 tokens, 148.1 tok/s``."""
    timings = completion.timings
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    return (
        f"prompt: {timings.prompt_tokens} tokens{cached}, "
        f"{timings.prompt_tokens_per_second:.1f} tok/s; "
        f"answer: {len(completion.tokens)} tokens, {timings.decode_tokens_per_second:.1f} tok/s"
    )


def has_chat_template(model: Model) -> bool:
    return "tokenizer.chat_template" in model.metadata


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises RequestError when it is something else."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not UTF-8 text: {error}") from error


def size(n_bytes: float) -> str:
    """Bytes for people, in decimal units as disks and bandwidths are sold: ``98.4 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.4g} {unit}"
    return f"{n_bytes:.0f} B"


def count(n: float) -> str:
    """A number of parameters as models are named: ``1.24 B``, ``134.5 M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n:.0f}"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "") -> str:
    """``rows`` in aligned columns; those numbered in ``right`` align to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        (
            indent
            + "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    )
