"""What goes wrong inside the server, seen from outside; without a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import headrace
from headrace.engine.engine import Engine
from headrace.serve.app import create_app
from headrace.serve.service import Service
from headrace.serve.settings import Settings


@pytest.fixture
def client(tiny_path: Path) -> Iterator[TestClient]:
    settings = Settings(model=str(tiny_path), name="tiny", allowed_hosts=("testserver",))
    service = Service(settings, lambda: headrace.load(tiny_path, "reference"))
    with TestClient(create_app(service)) as client:
        while client.get("/health/ready").status_code != 200:
            pass
        yield client


def test_an_error_of_the_server_s_own_is_said_and_written_down(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(service: Service, name: str | None) -> None:
        raise KeyError("details for the log")

    monkeypatch.setattr(Service, "check_model", broken)
    with caplog.at_level(logging.ERROR, "headrace.serve"):
        answer = client.get("/v1/models/tiny")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "details" not in answer.text
    assert "details for the log" in caplog.text
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": [300], "max_tokens": 9}), ("/v1/embeddings", {"input": [300]})],
)
def test_nobody_waits_for_an_engine_that_has_failed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict
) -> None:
    def broken(engine: Engine) -> bool:
        raise RuntimeError("a fault in the scheduler")

    monkeypatch.setattr(Engine, "step", broken)
    answer = client.post(path, json=body)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "failed")
    assert client.post(path, json=body).json()["error"]["code"] == "failed"
    assert client.get("/health/live").status_code == 200


def test_a_body_is_read_without_a_server_around_it(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": [300], "max_tokens": 2})
    assert answer.json()["usage"]["completion_tokens"] == 2
