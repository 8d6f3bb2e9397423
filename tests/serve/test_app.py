"""What goes wrong inside the server, seen from outside; without a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from headrace import api
from headrace.serve.app import create_app
from headrace.serve.service import Service
from headrace.serve.settings import Settings


@pytest.fixture
def client(tiny_path: Path) -> Iterator[TestClient]:
    settings = Settings(model=str(tiny_path), name="tiny", allowed_hosts=("testserver",))
    service = Service(settings, lambda: api.load(tiny_path, "reference"))
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


def test_a_body_is_read_without_a_server_around_it(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": [300], "max_tokens": 2})
    assert answer.json()["usage"]["completion_tokens"] == 2
