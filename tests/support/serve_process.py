"""A real ``headrace serve`` process, and plain ways to talk to it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

_DEVICE = str(Path(__file__).with_name("device_server.py"))


SLOW = ("--step-seconds", "0.005")
"""A device on which an answer of 2,000 tokens takes 10 seconds or more."""


class Server:
    """Started with ``arguments`` on a free port of the loopback; its log goes to ``log``.

    device: a fault of the device (``device_server.py``).
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        device: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        program = [_DEVICE, *device] if device else ["-m", "headrace", "serve"]
        command = [sys.executable, *program, *arguments, "--port", "0"]
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=sink, env=env
            )
        self.url = self._await(lambda: re.search(r'"url": "([^"]+)"', log.read_text()))[1]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _await(self, find: Any, seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := find()):
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return found

    def wait_ready(self, headers: dict[str, str] | None = None) -> Server:
        ready = lambda: self.client.get("/health/ready", headers=headers).status_code == 200  # noqa: E731
        self._await(ready)
        if headers is None:
            self.n_pages = sum(self.pages().values())
        return self

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"temperature": 0, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """The value of one metric; 0 when it has not been counted yet."""
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        shown = f"{name}{{{wanted}}}" if labels else name
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(shown + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def pages(self) -> dict[str, int]:
        states = ("held", "cached", "free")
        return {state: int(self.metric("headrace_kv_pages", state=state)) for state in states}

    def in_flight(self) -> int:
        return int(self.metric("headrace_sequences", state="in_flight"))

    def running(self) -> int:
        return int(self.metric("headrace_sequences", state="running"))

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing runs or waits."""
        self._await(lambda: self.in_flight() == 0 and self.running() == 0, seconds)

    def wait_running(self, n: int) -> None:
        self._await(lambda: self.running() >= n, 20)

    def check_pages(self) -> None:
        """Idle, no page held, and as many as at the start."""

        # A connection closed before the server took it may still come, however idle it was.
        def at_rest() -> bool:
            return self.in_flight() == self.running() == self.pages()["held"] == 0

        self._await(at_rest, 20)
        assert sum(self.pages().values()) == self.n_pages

    def connect(self, request: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        """A raw connection, with ``request`` sent."""
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(request)
        return raw

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def n_connections(self) -> int:
        """Connections that the server has open."""
        lines = Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()[1:]
        open_ones = [line.split()[1] for line in lines if line.split()[3] == "01"]
        return sum(address.endswith(f":{self.port:04X}") for address in open_ones)

    def records(self) -> list[dict[str, Any]]:
        """The log's lines."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """End the process by ``sig``; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.client.close()


def raw_post(path: str, body: bytes, *headers: str) -> bytes:
    """An HTTP request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + body


def events(response: httpx.Response) -> Iterator[dict[str, Any] | str]:
    """The data of a stream's events: objects, and "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])
