"""Real server processes: one on the real model for all tests, others on a tiny one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from openai import OpenAI
from serve_process import Server

from headrace.synth import write_synthetic


@pytest.fixture(scope="session")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2, with short timeouts."""
    server = Server(
        tmp_path_factory.mktemp("serve") / "log",
        *(str(smollm2_path), "--name", "smollm2", "--context", "2048"),
        *("--header-timeout", "1.5", "--body-timeout", "1.5", "--write-timeout", "2"),
    )
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends an answer by itself: it has no such token."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    content = path.read_bytes()
    for old, new in (
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.xxx_token_id"),
        (b"<|im_end|>", b"<|im_xxx|>"),
        (b"<|end_of_text|>", b"<|xxx_xx_xxxx|>"),
    ):
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)
    return path


@pytest.fixture
def start(tiny_path: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server on the tiny model with these arguments; it is killed in the end."""
    started: list[Server] = []

    def start(*arguments: str, ready: bool = True, model: Path = tiny_path,
              device: Sequence[str] = (), env: dict[str, str] | None = None) -> Server:  # fmt: skip
        log = tmp_path / f"log{len(started)}"
        server = Server(log, str(model), "--name", "tiny", *arguments, device=device, env=env)
        started.append(server)
        return server.wait_ready() if ready else server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
