"""The routes around the model: what is served, tokens, probes, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from headrace.api import Model
from headrace.serve.chat import encode as encode_chat
from headrace.serve.completing import service_of
from headrace.serve.problems import unavailable
from headrace.serve.schemas import DetokenizeRequest, TokenizeRequest
from headrace.serve.service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: HTTPRequest) -> dict[str, Any]:
    """The model that is served."""
    return {"object": "list", "data": [_model(service_of(http))]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, http: HTTPRequest) -> dict[str, Any]:
    """The model that is served, if ``name`` is its name."""
    service = service_of(http)
    service.check_model(name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    model = service.model
    return {
        "id": service.settings.served_name,
        "object": "model",
        "created": service.created,
        "owned_by": "headrace",
        "context_length": model.context,
        "architecture": model.config.architecture,
        "device": model.engine.runner.device_name,
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, http: HTTPRequest) -> Response:
    """Token ids of a text or a conversation."""
    service = service_of(http)

    def encode(model: Model) -> list[int]:
        if body.messages is not None:
            return encode_chat(service, model, body.messages)
        text = body.text or ""
        service.check_length(len(text))
        return model.tokenize(text, special=body.special, bos=body.bos)

    tokens = await service.text("messages" if body.messages else "text", encode)
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, http: HTTPRequest) -> Response:
    """The text of token ids."""
    text = await service_of(http).text(
        "tokens", lambda model: model.detokenize(body.tokens, special=body.special)
    )
    return JSONResponse({"text": text})


@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 while the process answers, whatever the model does."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(http: HTTPRequest) -> Response:
    """200 when requests are taken; 503 while loading, and from the first sign of the end."""
    engine = service_of(http).engine
    if engine.state != "ready":
        return unavailable(f"not ready: {engine.state}", engine.state).response()
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=Response)
async def metrics(http: HTTPRequest) -> Response:
    """Counters and gauges, in Prometheus' text format."""
    content = service_of(http).metrics.text()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
