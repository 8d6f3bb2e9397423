"""The application: routes and error answers, behind the guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import headrace
from headrace.errors import HeadraceError
from headrace.serve import chat, completions, embeddings, page, plain, responses
from headrace.serve.exchange import EXCHANGE, Exchange
from headrace.serve.guard import Guard
from headrace.serve.problems import Problem, from_error, from_validation, server_error
from headrace.serve.service import Service

logger = logging.getLogger("headrace.serve")


def create_app(service: Service) -> Guard:
    """The ASGI application of ``service``, which it starts and closes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.close()

    app = FastAPI(
        title="headrace",
        description="An OpenAI-compatible server for GGUF models.",
        version=headrace.__version__,
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            Problem: _on_problem,
            HeadraceError: _on_error,
            RequestValidationError: _on_validation,
            HTTPException: _on_http,
            Exception: _on_crash,
        },
    )
    app.state.service = service
    for module in (chat, completions, responses, embeddings, plain, page):
        app.include_router(module.router)
    return Guard(app, service)


async def _on_problem(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _answer(http, error)


async def _on_error(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    return _answer(http, from_error(error))


async def _on_validation(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(http, from_validation(error.errors()))


async def _on_http(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "this route has no such method"}
    text = message.get(error.status_code, str(error.detail))
    return _answer(http, Problem(error.status_code, text, headers=error.headers))


async def _on_crash(http: HTTPRequest, error: Exception) -> Response:
    """The answer; the guard, to whom the error goes next, writes it down."""
    return _answer(http, server_error())


def _answer(http: HTTPRequest, problem: Problem) -> Response:
    exchange: Exchange = http.scope[EXCHANGE]
    exchange.code = problem.code
    return problem.response()
