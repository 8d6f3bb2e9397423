"""Schemas that are hard to compile, or cannot be satisfied. None may stop other requests."""

from __future__ import annotations

import json
import threading
import time

import pytest
from serve_process import Server, events

pytestmark = pytest.mark.real_model

CHAIN = 5_000


def chain() -> dict:
    """Definitions that refer to each other in a row: compiling them overflows an ordinary stack."""
    links = {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}}
             for i in range(CHAIN)}  # fmt: skip
    return {"$defs": {**links, f"a{CHAIN}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = {
    "an unclosed character class": {"type": "string", "pattern": "[a-"},
    "a reference to itself": {"$ref": "#"},
    "references in a circle": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a",
    },
    "a chain of references": chain(),
    "90 levels": nested(90),
    "nothing between 5 and 3": {"type": "integer", "minimum": 5, "maximum": 3},
    "string and integer at once": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "a schema elsewhere": {"$ref": "http://127.0.0.1:1/schema"},
    "a keyword that cannot be forced": {"not": {"type": "string"}},
    "false": {"enum": []},
}  # fmt: skip
SERVED = {
    "a recursive tree": {
        "type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    },
    "50,000 values": {"enum": [f"value {i}" for i in range(50_000)]},
    "a billion items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a billion letters": {"type": "string", "minLength": 10**9},
    "a pattern that explodes": {"type": "string", "pattern": "^(a|b)*a(a|b){30}$"},
}  # fmt: skip


def ask(server: Server, schema: dict, **fields):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "response_format": form,
         "max_completion_tokens": 8, "temperature": 0, **fields},
    )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(server: Server, name: str) -> None:
    response = ask(server, REFUSED[name])
    assert response.status_code == 400, response.text
    assert len(response.json()["error"]["message"]) < 500
    server.check_pages()


def test_900_levels(server: Server) -> None:
    schema = '{"items":' * 900 + "{}" + "}" * 900
    form = '{"type": "json_schema", "json_schema": {"name": "x", "schema": ' + schema + "}}"
    body = '{"messages": [{"role": "user", "content": "Hi"}], "response_format": ' + form + "}"
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]


def test_a_grammar_that_explodes_on_the_way_fails_its_own_stream(server: Server) -> None:
    options = [
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"a{{{i}}}.*b"}}}
        for i in range(300)
    ]
    [empty] = server.post("/tokenize", {"text": "{}"}).json()["tokens"]  # the only way around it
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"anyOf": options}}}
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": form,
        "logit_bias": {str(empty): -100},
        "stream": True,
        "max_tokens": 20,
        "temperature": 0,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        *_, error, done = events(response)
    assert done == "[DONE]"
    assert "the constraint failed" in error["error"]["message"]
    assert error["error"]["param"] == "response_format"
    server.check_pages()


@pytest.mark.parametrize("name", SERVED)
def test_served(server: Server, name: str) -> None:
    response = ask(server, SERVED[name])
    assert response.status_code == 200, response.text
    server.check_pages()


def test_a_schema_of_a_tool_is_checked_too(server: Server) -> None:
    function = {"name": "f", "parameters": {"type": "string", "pattern": "("}}
    tool = {"type": "function", "function": function}
    response = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


def test_they_do_not_stop_others(server: Server) -> None:
    """Streams go on, token by token, while every hostile schema is tried."""
    slow = {"type": "object", "properties": {
        f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i % 50}}}x.*{i}$"} for i in range(9_000)
    }}  # fmt: skip
    began: list[float] = []

    def attack() -> None:
        for schema in (*REFUSED.values(), *SERVED.values()):
            ask(server, schema)
        began.append(time.perf_counter())
        ask(server, slow)  # for seconds: most machines give up after the 5 that it may take

    body = {"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0, "stream": True,
            "ignore_eos": True}  # fmt: skip
    alone = server.complete(**{**body, "stream": False}).json()["choices"][0]["text"]
    attacker = threading.Thread(target=attack)
    attacker.start()
    arrivals: list[float] = []
    while attacker.is_alive():
        text = ""
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            for event in events(response):
                if attacker.is_alive():
                    arrivals.append(time.perf_counter())
                text += "" if event == "[DONE]" else event["choices"][0]["text"]
        assert text == alone
    n_during = sum(at > began[0] for at in arrivals)
    print(f"{n_during} tokens during the slow attack")
    assert n_during > 10


def test_choices_of_one_schema_do_not_share_their_place_in_it(server: Server) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0},
              "minItems": 2, "maxItems": 6}  # fmt: skip
    answer = ask(server, schema, n=4, temperature=2.0, seed=1, max_completion_tokens=40).json()
    for choice in answer["choices"]:
        assert 2 <= len(json.loads(choice["message"]["content"])) <= 6
