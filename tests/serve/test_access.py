"""Who may ask: keys, hosts, origins; and where settings come from."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from serve_process import Server
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.errors import RequestError
from headrace.serve.settings import Settings, load_settings

KEY = "a-secret-key"


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


def test_every_route_but_liveness_needs_the_key(start: Callable[..., Server]) -> None:
    environment = {**os.environ, "HEADRACE_API_KEYS": f"{KEY}, another-key"}
    server = start(ready=False, env=environment)
    good = {"Authorization": f"Bearer {KEY}"}
    server.wait_ready(good)
    paths = server.client.get("/openapi.json", headers=good).json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(routes) >= 11
    for method, path in [*routes, ("get", "/"), ("get", "/openapi.json"), ("get", "/nothing")]:
        response = server.client.request(method, path.replace("{name}", "tiny"))
        expected = 200 if path == "/health/live" else 401
        assert response.status_code == expected, (method, path)
        if expected == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "WWW-Authenticate" in response.headers
    for wrong in (
        {"X-Api-Key": KEY}, {"Api-Key": KEY}, {"Authorization": KEY},
        {"Authorization": "Bearer " + KEY[:-1]}, {"Authorization": "Bearer"},
        {"Authorization": f"Token {KEY}"}, {"Authorization": basic("wrong")},
        {"Authorization": "Basic %%%"}, {"Authorization": b"Bearer " + b"\xe9\xe9"},
        {"Cookie": f"key={KEY}"},
    ):  # fmt: skip
        assert server.client.get("/v1/models", headers=wrong).status_code == 401, wrong
    assert server.client.get(f"/v1/models?api_key={KEY}").status_code == 401
    for right in (good, {"Authorization": "bearer another-key"}, {"Authorization": basic(KEY)}):
        assert server.client.get("/v1/models", headers=right).status_code == 200
    challenge = server.client.get("/").headers["WWW-Authenticate"]
    assert challenge.startswith("Basic")  # a browser then asks for it
    assert KEY not in server.log.read_text()


def test_allowed_hosts_and_origins(start: Callable[..., Server]) -> None:
    page = "https://chat.example"
    server = start("--allowed-hosts", "llm.example,b.example", "--allowed-origins", page)
    for host, status in (("llm.example", 200), ("b.example:99", 200), ("c.example", 403)):
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status
    preflight = server.client.options("/v1/chat/completions", headers={"Origin": page})
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == page
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
    allowed = server.client.get("/v1/models", headers={"Origin": page})
    assert allowed.headers["Access-Control-Allow-Origin"] == page
    foreign = server.client.get("/v1/models", headers={"Origin": page + ".evil.example"})
    assert foreign.status_code == 403
    assert "Access-Control-Allow-Origin" not in foreign.headers


def test_it_listens_on_the_loopback_only(start: Callable[..., Server]) -> None:
    server = start(ready=False)
    assert server.url.startswith("http://127.0.0.1:")
    addresses = [
        line.split()[1]
        for line in Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{server.port:04X}")
    ]
    assert addresses == [f"0100007F:{server.port:04X}"]


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "a.gguf"\nport = 1\nmax_waiting = 1\nallowed_hosts = ["x", "y"]\n')
    environment = {"HEADRACE_PORT": "2", "HEADRACE_MAX_WAITING": "2", "OTHER": "3"}
    settings = load_settings({"port": 3, "host": None}, file, environment)
    assert (settings.port, settings.max_waiting, settings.host) == (3, 2, "127.0.0.1")
    assert settings.allowed_hosts == ("x", "y")
    assert settings.served_name == "a"
    named = load_settings({}, None, {"HEADRACE_CONFIG": str(file), "HEADRACE_API_KEYS": "k" * 8})
    assert (named.port, named.api_keys) == (1, ("k" * 8,))
    assert "kkk" not in repr(named)


def test_a_setting_of_few_words(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "a.gguf"\ncache_type = "q8_0"\n')
    assert load_settings({}, file, {}).cache_type == "q8_0"
    assert load_settings({}, file, {"HEADRACE_CACHE_TYPE": "f16"}).cache_type == "f16"
    with pytest.raises(RequestError, match="cache_type must be one of f16, q8_0, not 'q4_0'"):
        load_settings({"cache_type": "q4_0"}, file, {})


def test_a_setting_that_is_true_or_false(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "a.gguf"\nbatch_invariant = true\n')
    name = "HEADRACE_BATCH_INVARIANT"
    assert load_settings({}, file, {}).batch_invariant
    assert not load_settings({}, file, {name: "false"}).batch_invariant
    assert load_settings({"batch_invariant": True}, file, {name: "0"}).batch_invariant
    with pytest.raises(RequestError, match=f"{name} must be true or false, not 'maybe'"):
        load_settings({}, file, {name: "maybe"})
    file.write_text('model = "a.gguf"\nbatch_invariant = 2\n')
    with pytest.raises(RequestError, match="batch_invariant must be true or false, not 2"):
        load_settings({}, file, {})


def test_every_setting_has_a_flag_and_a_line_in_the_help() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    for setting in fields(Settings):
        if setting.name in ("model", "api_keys"):  # an argument; and never on the command line
            continue
        assert f"--{setting.name.replace('_', '-')} " in result.output, setting.name
    assert "--api-key-file" in result.output
    assert "--api-keys" not in result.output


def test_every_setting_can_be_in_the_environment() -> None:
    values = {
        "str": "text", "str | None": "text", "int | None": "7", "int": "8", "float": "9.5",
        "tuple[str, ...]": "one-of-them,another-one", "bool": "True",
    }  # fmt: skip
    special = {"log_format": "text", "log_level": "error", "cache_type": "q8_0"}
    environment = {
        f"HEADRACE_{setting.name.upper()}": special.get(setting.name, values[setting.type])
        for setting in fields(Settings)
    }
    environment["HEADRACE_MAX_BODY"] = "5000"
    settings = load_settings({}, None, environment)
    for setting in fields(Settings):
        given = environment[f"HEADRACE_{setting.name.upper()}"]
        value = getattr(settings, setting.name)
        assert (",".join(value) if isinstance(value, tuple) else str(value)) == given, setting.name


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("model = 1", "model"), ("modle = 'x'", "modle"), ("model = ", "TOML"),
        ("model='a'\nport = 70000", "port"), ("model='a'\nport = '1'", "port"),
        ("model='a'\nallowed_hosts = 'x'", "allowed_hosts"), ("port = 1", "model"),
        ("model='a'\nwrite_timeout = 0", "write_timeout"), ("model='a'\nport = true", "port"),
        ("model='a'\napi_keys = ['short']", "api_keys"), ("model='a'\nlog_format = 'xml'", "xml"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(RequestError, match=word):
        load_settings({}, file, {})


def test_another_address_needs_a_key() -> None:
    with pytest.raises(RequestError, match="API key"):
        Settings(model="m", host="0.0.0.0")
    assert Settings(model="m", host="0.0.0.0", api_keys=(KEY,)).api_keys
