"""Server-sent events: ``data: …`` and an empty line.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.serve.generation import Generation
from headrace.serve.problems import Problem

DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event; JSON has no line breaks, so neither has its line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends ``chunks``, made from ``generation``, until they end or the client goes away.

    A Problem on the way becomes an error event. ``[DONE]`` comes last in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._chunks = generation, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        watcher = asyncio.create_task(self._generation.cancel_on_disconnect(receive))
        try:
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for chunk in self._chunks:
                    await write(chunk)
            except Problem as problem:
                if problem.status == 499:
                    return
                await write(event(problem.body))
            await write(DONE, more=False)
        finally:
            watcher.cancel()
            self._generation.cancel()
