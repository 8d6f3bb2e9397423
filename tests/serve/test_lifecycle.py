"""Requests that end early, in every state, and the life of the process. Pages are counted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serve_process import SLOW, Server, events, raw_post

LONG = {"prompt": [300, 301, 302], "max_tokens": 2000, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two completions run at once, slowly; eight may wait."""
    log = tmp_path_factory.mktemp("tiny") / "log"
    options = ("--max-sequences", "2", "--max-waiting", "8", "--write-timeout", "1")
    server = Server(log, str(tiny_path), "--name", "tiny", *options, device=SLOW)
    try:
        yield server.wait_ready()
        server.check_pages()
    finally:
        assert server.stop() == 0


def request(**fields) -> bytes:
    return raw_post("/v1/completions", json.dumps(LONG | fields).encode())


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_while_it_runs(tiny: Server, stream: bool) -> None:
    raw = tiny.connect(request(stream=stream))
    tiny.wait_running(1)
    if stream:
        answer = b""
        while b"text" not in answer and (more := raw.recv(4096)):
            answer += more
        assert b"text" in answer
    started = tiny.metric("headrace_tokens_total", kind="generated")
    raw.close()
    tiny.check_pages()
    made = tiny.metric("headrace_tokens_total", kind="generated") - started
    assert 0 < made < 2000  # it did not run to its end for nobody


def test_disconnect_while_it_waits(tiny: Server) -> None:
    running = [tiny.connect(request(n=1, seed=i)) for i in range(2)]
    tiny.wait_running(2)
    waiting = [tiny.connect(request(stream=i % 2 == 0)) for i in range(4)]
    tiny._await(lambda: tiny.in_flight() == 6)
    for raw in waiting:
        raw.close()
    tiny._await(lambda: tiny.in_flight() == 2)
    assert tiny.running() == 2  # those that ran were left alone
    for raw in running:
        raw.close()
    tiny.check_pages()


@pytest.mark.real_model
def test_disconnect_during_prefill(server: Server) -> None:
    body = {"prompt": [500 + i for i in range(1900)], "max_tokens": 4, "stream": True}
    with server.connect(raw_post("/v1/completions", json.dumps(body).encode())):
        server.wait_running(1)
        assert server.pages()["held"] > 0
    server.check_pages()


def test_a_thousand_aborts_lose_no_page(tiny: Server) -> None:
    rng = random.Random(1)

    def abort_some() -> None:
        for _ in range(125):
            prompt = [rng.randrange(300, 500) for _ in range(rng.choice((1, 70, 300)))]
            with tiny.connect(request(prompt=prompt, stream=rng.random() < 0.5, max_tokens=500)):
                time.sleep(rng.choice((0, 0.001, 0.01, 0.03)))

    threads = [threading.Thread(target=abort_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiny.check_pages()
    assert tiny.complete(prompt="hello", max_tokens=3).status_code == 200


def test_a_reader_that_stops_reading_is_cut(tiny: Server) -> None:
    body = request(stream=True, n=2, logprobs=50)
    with tiny.connect(body, receive_buffer=4096) as raw:
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        assert tiny.complete(prompt="x", max_tokens=2).status_code == 200  # others are served
        tiny.wait_idle(30)
        tiny._await(lambda: any(r.get("error") == "write_timeout" for r in tiny.records()))
    tiny.check_pages()


@pytest.mark.real_model
def test_an_answer_that_nobody_reads_does_not_stay_for_ever(server: Server) -> None:
    """One that is whole, and more than the kernel takes: the request ends, its connection must,
    too."""
    [longest] = server.post("/tokenize", {"text": "#" * 80}).json()["tokens"]
    before = server.n_connections()
    body = raw_post("/detokenize", json.dumps({"tokens": [longest] * 200_000}).encode())
    with server.connect(body, receive_buffer=4096) as raw:
        server._await(lambda: any(r.get("path") == "/detokenize" for r in server.records()))
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        server._await(lambda: server.n_connections() == before, 20)


SLOW_EMBEDDINGS = ("--step-seconds", "0.5")
EMBEDDINGS = {"input": [[300] * 2000, [301]]}  # the first takes 16 s or more


def test_disconnect_during_embeddings(start: Callable[..., Server]) -> None:
    server = start(device=SLOW_EMBEDDINGS)
    with server.connect(raw_post("/v1/embeddings", json.dumps(EMBEDDINGS).encode())):
        server._await(lambda: server.pages()["held"] > 0)

    def record() -> dict:
        return next((r for r in server.records() if r.get("path") == "/v1/embeddings"), {})

    server._await(record)
    assert (record()["status"], record()["error"]) == (499, "disconnected")
    assert record()["ms"] < 10_000
    assert record()["prompt_tokens"] == 2001
    server._await(lambda: server.pages()["held"] == 0, 5)  # when the step that runs has ended
    server.check_pages()


def test_embeddings_are_ended_like_answers(start: Callable[..., Server]) -> None:
    server = start("--request-timeout", "1", "--drain-timeout", "0.1", device=SLOW_EMBEDDINGS)
    late = server.post("/v1/embeddings", EMBEDDINGS)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    server._await(lambda: server.pages()["held"] == 0, 5)
    answers: list[httpx.Response] = []
    ask = threading.Thread(target=lambda: answers.append(server.post("/v1/embeddings", EMBEDDINGS)))
    ask.start()
    server._await(lambda: server.pages()["held"] > 0)
    server.process.send_signal(signal.SIGTERM)
    ask.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
    assert server.stop() == 0


def test_too_many_connections(start: Callable[..., Server]) -> None:
    server = start("--max-connections", "3")
    others = [server.connect() for _ in range(3)]
    # A connection counts once the server has taken it up.
    server._await(lambda: server.client.get("/v1/models").status_code == 503)
    full = server.client.get("/v1/models")
    assert (full.status_code, full.json()["error"]["code"]) == (503, "too_many_connections")
    assert int(full.headers["Retry-After"]) >= 1
    assert server.client.get("/health/live").status_code == 200
    for raw in others:
        raw.close()
    server._await(lambda: server.client.get("/v1/models").status_code == 200)


def test_a_full_queue_is_429(tiny: Server) -> None:
    held = [tiny.connect(request(n=1, seed=i, stream=True)) for i in range(10)]
    tiny._await(lambda: tiny.in_flight() == 10)
    full = tiny.complete(prompt="x", max_tokens=1)
    assert full.status_code == 429
    assert full.json()["error"]["code"] == "queue_full"
    assert 1 <= int(full.headers["Retry-After"]) <= 60
    assert tiny.client.get("/health/ready").status_code == 200
    for raw in held:
        raw.close()
    tiny.check_pages()
    assert tiny.complete(prompt="x", max_tokens=1).status_code == 200


def test_more_choices_than_fit_the_queue_is_429(tiny: Server) -> None:
    assert tiny.complete(prompt="x", max_tokens=1, n=11).status_code == 429
    assert tiny.complete(prompt="x", max_tokens=1, n=17).status_code == 400
    assert tiny.complete(prompt="x", max_tokens=1, n=10).status_code == 200


def test_preemption_when_pages_run_out(start: Callable[..., Server]) -> None:
    server = start("--context", "512", "--cache-tokens", "640", "--max-sequences", "4")
    prompts = [[400 + i] for i in range(3)]

    def texts(prompt: list) -> list[str]:
        choices = server.complete(prompt=prompt, max_tokens=400).json()["choices"]
        return [choice["text"] for choice in choices]

    alone = [texts([prompt])[0] for prompt in prompts]
    assert server.metric("headrace_preemptions_total") == 0
    assert texts(prompts) == alone
    assert server.metric("headrace_preemptions_total") > 0
    server.check_pages()


def test_an_answer_that_takes_too_long(start: Callable[..., Server]) -> None:
    server = start("--request-timeout", "0.2", device=SLOW)
    late = server.post("/v1/completions", LONG)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        *_, error, done = events(response)
    assert (error["error"]["code"], done) == ("timeout", "[DONE]")
    server.check_pages()


def test_sigterm_lets_streams_end_and_begins_nothing_new(start: Callable[..., Server]) -> None:
    server = start(device=SLOW)
    late = server.connect(request()[:-1])  # its last byte comes after the signal
    body = LONG | {"stream": True, "max_tokens": 300}
    with late, server.client.stream("POST", "/v1/completions", json=body) as response:
        stream = events(response)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        server._await(lambda: any(r["event"] == "draining" for r in server.records()))
        late.sendall(b"}")
        assert late.recv(1000).startswith(b"HTTP/1.1 503")
        *_, last, done = stream
    assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert server.stop() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url + "/health/live")


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_cuts_streams_with_an_error_event(
    start: Callable[..., Server], signals: int
) -> None:
    timeout = "0.1" if signals == 1 else "30"
    server = start("--drain-timeout", timeout, "--max-sequences", "8", device=SLOW)
    statuses: list[int] = []
    whole = threading.Thread(
        target=lambda: statuses.append(server.post("/v1/completions", LONG | {"n": 6}).status_code)
    )
    whole.start()
    body = LONG | {"stream": True, "n": 2, "seed": 3}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        stream = events(response)
        next(stream)
        server.wait_running(8)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        *_, error, done = stream
    assert (error["error"]["code"], done) == ("shutting_down", "[DONE]")
    whole.join()
    assert statuses == [503]
    assert server.stop() == 0
    assert server.records()[-1]["event"] == "stopped"


def test_while_it_loads_it_lives_but_is_not_ready(start: Callable[..., Server]) -> None:
    server = start(ready=False, device=("--load-seconds", "3"))
    assert server.client.get("/health/live").status_code == 200
    for response in (
        server.client.get("/health/ready"), server.client.get("/v1/models"),
        server.complete(prompt="x"), server.post("/v1/embeddings", {"input": "x"}),
    ):  # fmt: skip
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["code"] == "loading"
    server.wait_ready()
    assert server.complete(prompt="x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache-tokens", str(2**36)], ["bytes", "KV cache"]),
        (["--context", "99999999"], ["context"]),
        (["--host", "0.0.0.0"], ["API key"]),
        (["--host", "192.0.2.1", "--api-key-file", "KEYS"], ["listen"]),
        (["--max-waiting", "-1"], ["max_waiting"]),
        (["--device", "abacus"], ["abacus"]),
        (["--config", "/nonexistent.toml"], ["/nonexistent.toml"]),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tiny_path: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "KEYS").write_text("a-secret-key\n")
    command = [sys.executable, "-m", "headrace", "serve", str(tiny_path), "--port", "0"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("headrace: ")
    assert "internal error" not in last
    for word in words:
        assert word in last


def test_out_of_memory_in_service_fails_one_request(start: Callable[..., Server]) -> None:
    server = start(device=("--fails-at", "500"))
    long = {"prompt": [300], "max_tokens": 600, "temperature": 0}
    answers: list[httpx.Response] = []
    others = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", long)))
    others.start()
    server.wait_running(1)
    failed = server.complete(prompt=[500, 300], max_tokens=2)
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "out_of_memory")
    body = {"prompt": [500, 300], "max_tokens": 2, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        error, done = events(response)
    assert (error["error"]["code"], done) == ("out_of_memory", "[DONE]")
    others.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 600
    assert server.complete(prompt=[300], max_tokens=2).status_code == 200
    server.check_pages()
    assert server.stop() == 0


def test_the_engine_thread_ends_with_the_server_even_while_loading(
    start: Callable[..., Server],
) -> None:
    server = start(ready=False, device=("--load-seconds", "1"))
    assert server.stop() == 0
    assert server.records()[-1]["event"] == "stopped"
