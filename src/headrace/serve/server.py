"""The process: sockets, signals, and the order in which things end."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from headrace import loading
from headrace.api import Model
from headrace.engine.engine import DEFAULT_CONTEXT
from headrace.errors import RequestError
from headrace.serve import logs
from headrace.serve.app import create_app
from headrace.serve.problems import unavailable
from headrace.serve.protocol import protocol
from headrace.serve.service import Service
from headrace.serve.settings import Settings

logger = logging.getLogger("headrace.serve")


def load_model(settings: Settings) -> Model:
    """The model that ``settings`` name, ready for chat."""
    context = settings.context or DEFAULT_CONTEXT
    return loading.load(
        settings.model,
        settings.device,
        context=settings.context,
        threads=settings.threads,
        chat=True,
        max_sequences=settings.max_sequences,
        batch_invariant=settings.batch_invariant,
        cache_type=settings.cache_type,
        cache_tokens=settings.cache_tokens or 4 * context,
    )


def serve(settings: Settings, load: Callable[[], Model] | None = None) -> None:
    """Serve until a signal. Raises what loading does; RequestError when the port cannot be had.

    SIGTERM or Ctrl-C: no new requests; those running may end within ``drain_timeout``; streams that
    are cut get an error event and ``[DONE]``. A second signal cuts them at once.
    """
    logs.configure(settings.log_format, settings.log_level)
    service = Service(settings, load or (lambda: load_model(settings)))
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        http=protocol(settings),
        ws="none",
        lifespan="on",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_timeout) + 10,
    )
    server = _Server(config, service)
    try:
        server.run()
    except SystemExit:
        raise RequestError(
            f"cannot listen on {settings.host} port {settings.port}: is it in use?"
        ) from None
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once all has ended
    if service.engine.error is not None:
        raise service.engine.error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._signals = service, 0
        service.engine.on_state = self._on_state

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        facts = {"url": f"http://{shown}:{port}", "model": self._service.settings.served_name}
        logger.info("listening", extra={"facts": facts})

    async def shutdown(self, sockets: Any = None) -> None:
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await draining
        logger.info("stopped")

    async def _drain(self) -> None:
        """Let what runs end; after the drain timeout, or a second signal, cut it."""
        service = self._service
        service.engine.state = "draining"
        logger.info("draining", extra={"facts": {"in_flight": service.engine.in_flight}})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + service.settings.drain_timeout
        while service.exchanges and loop.time() < deadline and self._signals < 2:
            await asyncio.sleep(0.02)
        service.end_all(unavailable("the server is shutting down", "shutting_down", 5))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.should_exit = True

    def _on_state(self) -> None:
        state = self._service.engine.state
        if state == "ready":
            # A full collection would pass through the vocabulary's objects now and then, and keep
            # all threads waiting for 50 ms or more. They stay until the end.
            gc.collect()
            gc.freeze()
        logger.info(state)
        if state == "failed":
            self._service.end_all(unavailable("the engine has failed", "failed", 5))
            self.should_exit = True
