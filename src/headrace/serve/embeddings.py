"""``POST /v1/embeddings``: the mean of a text's final hidden states, at unit length."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from headrace.engine.engine import Engine
from headrace.errors import HeadraceError
from headrace.serve import completing as common
from headrace.serve.completions import as_prompts
from headrace.serve.problems import Problem, from_error
from headrace.serve.schemas import EmbeddingRequest

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, http: HTTPRequest) -> Response:
    """One vector of ``d_model`` numbers for each input."""
    service = common.service_of(http)
    service.check_model(body.model)
    inputs = as_prompts(body.input)
    if len(inputs) > service.settings.max_inputs:
        raise Problem(400, f"input: at most {service.settings.max_inputs} texts, not {len(inputs)}",
                      param="input", code="invalid_value")  # fmt: skip
    texts = await service.text("input", lambda model: service.tokenise(model, inputs))
    n_tokens = sum(map(len, texts))
    common.note(http, body.user, choices=len(texts), prompt_tokens=n_tokens)
    engine = service.model.engine
    data: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(service.settings.request_timeout):
            for index, tokens in enumerate(texts):
                vector = await service.engine.run(mean_hidden(engine, tokens))
                shown: str | list[float] = vector.tolist()
                if body.encoding_format == "base64":
                    shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
                data.append({"object": "embedding", "index": index, "embedding": shown})
    except HeadraceError as error:
        raise from_error(error, "input") from error
    except TimeoutError:
        raise Problem(504, "the embeddings took too long", code="timeout") from None
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": service.settings.served_name,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }
    )


def mean_hidden(engine: Engine, tokens: Sequence[int]) -> Iterator[NDArray[np.float32] | None]:
    """None for each piece of the work, then the vector, float32 [d_model]."""
    total = np.zeros(engine.runner.decoder.config.d_model, np.float64)
    for states in engine.hidden(tokens):
        total += states.sum(axis=0, dtype=np.float64)
        yield None
    length = float(np.linalg.norm(total))
    yield (total / (length or 1.0)).astype(np.float32)
