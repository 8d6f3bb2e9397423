"""Requests made up from the served OpenAPI document: none ends in a 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serve_process import Server

pytestmark = pytest.mark.real_model


LIMITS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def check(case) -> None:
    limit = LIMITS.get(case.path)
    if isinstance(case.body, dict) and limit:  # what is valid shall be quick, too
        for name in {limit, "max_tokens"} & case.body.keys() or {limit}:
            if isinstance(case.body.get(name, 4), int) and case.body.get(name, 4) > 3:
                case.body[name] = 4
    response = case.call(timeout=60)
    case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


def test_no_request_is_an_error_of_the_server(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        n_examples = 25 if operation.method == "post" else 3
        run = settings(
            max_examples=n_examples, deadline=None, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue
            run(given(operation.as_strategy(generation_mode=mode))(check))()


def test_nothing_is_left_behind(server: Server) -> None:
    server.check_pages()
