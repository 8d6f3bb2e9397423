"""The parent's side of the process that renders chat templates (``template_worker``)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from headrace.errors import TemplateError


@dataclass(frozen=True)
class Limits:
    """What one render may take. Exceeding any of them is a TemplateError."""

    cpu_s: float = 2.0
    wall_s: float = 20.0
    memory_bytes: int = 512 << 20
    """Address space of the whole child process, of which Python itself takes about 50 MB."""
    output_chars: int = 16 << 20


class Outcome(Enum):
    """The first byte of an answer."""

    OK = b"o"
    REFUSED = b"r"
    FAILED = b"f"


class TemplateProcess:
    """The child process: started on demand, replaced when a template has used up its limits."""

    def __init__(self, limits: Limits, twins: str) -> None:
        self._limits = limits
        self._twins = twins
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._end: Callable[[], object] = lambda: None

    def start(self) -> None:
        with self._lock:
            self._running()

    def stop(self) -> None:
        with self._lock:
            self._discard()

    def ask(self, request: bytes) -> tuple[Outcome, str]:
        """Outcome and text. Raises TemplateError when the child ends or does not answer."""
        with self._lock:
            process = self._running()
            deadline = time.monotonic() + self._limits.wall_s
            try:
                _write_frame(process, request)
                reply = self._read_frame(process, deadline)
            except (BrokenPipeError, EOFError, TimeoutError) as error:
                self._discard()
                raise TemplateError(self._cause(process, error)) from None
            except BaseException:
                self._discard()  # a reply nobody waits for must not answer the next request
                raise
        return Outcome(reply[:1]), reply[1:].decode("utf-8", "surrogatepass")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        here = Path(__file__).parent
        kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(here / "template_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in kept if name in os.environ},
                bufsize=0,
            )
        except OSError as error:
            raise TemplateError(f"cannot start the template process: {error}") from None
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _end_process, process)
        setup = {
            "path": [entry for entry in sys.path if entry],
            "here": str(here),
            "cpu_s": self._limits.cpu_s,
            "memory_bytes": self._limits.memory_bytes,
            "output_chars": self._limits.output_chars,
            "twins": self._twins,
        }
        _write_frame(process, json.dumps(setup).encode())
        return process

    def _discard(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._end()
        self._process = None

    def _read_frame(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        size = int.from_bytes(_read_exactly(process, 4, deadline), "little")
        if size > 4 * self._limits.output_chars + 8192:
            raise EOFError
        return _read_exactly(process, size, deadline)

    def _cause(self, process: subprocess.Popen[bytes], error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"the chat template did not finish within {self._limits.wall_s:g} s"
        if process.returncode == -signal.SIGPROF:
            return f"the chat template used more than {self._limits.cpu_s:g} s of CPU time"
        return (
            f"the chat template ended its process (exit status {process.returncode}), "
            "probably by using too much memory"
        )


def _write_frame(process: subprocess.Popen[bytes], payload: bytes) -> None:
    assert process.stdin is not None
    rest = memoryview(len(payload).to_bytes(4, "little") + payload)
    while rest:
        rest = rest[process.stdin.write(rest) :]


def _read_exactly(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    assert process.stdout is not None
    parts = []
    while size:
        ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        part = os.read(process.stdout.fileno(), size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.kill()
    process.wait()
