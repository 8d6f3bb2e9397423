"""The limits of a connection that uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.serve.exchange import CONNECTION
from headrace.serve.settings import Settings

MAX_HEAD = 64 << 10
"""Bytes of a request line and its headers."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """uvicorn's, which waits for ever for the headers of a request, keeps any number of them, and
    cannot be rid of a client that has stopped reading (closing waits until it has read all)."""

    class Protocol(HttpToolsProtocol):
        timed_out = False
        _awaits_headers = True
        _n_head = 0
        _header_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None

        @property
        def n_open(self) -> int:
            return len(self.connections)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # paused while the kernel takes no more
            self._await_headers()
            if self.n_open > 2 * settings.max_connections:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._header_timer)
            _cancel(self._reader_timer)
            super().connection_lost(exc)

        # Headers

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._awaits_headers and not self.transport.is_closing():
                self._n_head += len(data)
                if self._n_head > MAX_HEAD:
                    self.transport.write(_TOO_LARGE)
                    self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            extensions: dict[str, Any] = {CONNECTION: self}
            self.scope["extensions"] = extensions
            self._await_headers()

        def on_headers_complete(self) -> None:
            self._awaits_headers = False
            _cancel(self._header_timer)
            super().on_headers_complete()

        def _unsupported_upgrade_warning(self) -> None:
            """uvicorn's advises to install a library for WebSockets."""

        def _await_headers(self) -> None:
            self._awaits_headers, self._n_head = True, 0
            _cancel(self._header_timer)
            self._header_timer = self.loop.call_later(settings.header_timeout, self.transport.abort)

        # Readers

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader(None)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._reader_timer)

        def _watch_reader(self, n_before: int | None) -> None:
            """Cut the connection unless some bytes go out in every ``write_timeout``."""
            n_left = self.transport.get_write_buffer_size()
            if n_before is not None and n_left >= n_before:
                self.timed_out = True
                self.transport.abort()
                return
            _cancel(self._reader_timer)
            self._reader_timer = self.loop.call_later(
                settings.write_timeout, self._watch_reader, n_left
            )

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
