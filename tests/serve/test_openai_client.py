"""OpenAI's own client against a real server process on a real model."""

from __future__ import annotations

import json
from typing import Annotated

import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from serve_process import Server

pytestmark = pytest.mark.real_model

ASK = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
MODEL = "smollm2"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def chat(client: OpenAI, **options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": ASK, "temperature": 0, "max_completion_tokens": 24} | options
    )


def test_models(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == client.models.retrieve(MODEL).id == MODEL
    assert model.context_length == 2048


def test_chat(client: OpenAI) -> None:
    answer = chat(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 24


def test_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(delta or "" for delta in deltas) == whole.choices[0].message.content
    assert len([delta for delta in deltas if delta]) > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_seed_and_n(client: OpenAI) -> None:
    options = {"n": 3, "seed": 5, "temperature": 1.2, "max_completion_tokens": 12}
    answer, same = chat(client, **options), chat(client, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in same.choices]
    alone = chat(client, **options | {"n": 1, "seed": 6})
    assert alone.choices[0].message.content == texts[1]
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens  # counted once


def test_stop_max_tokens_bias_and_penalties_take_effect(client: OpenAI, server: Server) -> None:
    whole = chat(client).choices[0].message.content
    before, _, _ = whole.partition("Paris")
    stopped = chat(client, stop=["Paris"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (before, "stop")
    cut = chat(client, max_completion_tokens=2).choices[0]
    assert cut.finish_reason == "length"
    assert chat(client, max_completion_tokens=openai.NOT_GIVEN, max_tokens=2).choices[0] == cut
    [paris] = server.post("/tokenize", {"text": " Paris"}).json()["tokens"]
    assert "Paris" not in chat(client, logit_bias={str(paris): -100}).choices[0].message.content
    plain, penalised = (
        client.completions.create(
            model=MODEL, prompt="x = 1000000", max_tokens=24, temperature=0, frequency_penalty=p
        ).choices[0].text
        for p in (0, 2)
    )  # fmt: skip
    assert plain.count("0") > penalised.count("0")


def test_stop_strings_across_tokens(client: OpenAI) -> None:
    options = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 24,
               "temperature": 0}  # fmt: skip
    whole = client.completions.create(**options).choices[0].text
    for at in range(1, len(whole) - 6, 4):
        stop = whole[at : at + 6]
        before = whole[: whole.find(stop)]
        choice = client.completions.create(**options, stop=[stop]).choices[0]
        assert (choice.text, choice.finish_reason) == (before, "stop")
        chunks = client.completions.create(**options, stop=[stop, "never"], stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == before


def test_extensions(client: OpenAI) -> None:
    greedy = chat(client).choices[0].message.content
    one = chat(client, temperature=5, extra_body={"top_k": 1}).choices[0].message.content
    assert one == greedy
    one = chat(client, temperature=5, extra_body={"min_p": 1.0}).choices[0].message.content
    assert one == greedy


def test_logprobs(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_many_log_probabilities_are_the_same_whole_and_streamed(client: OpenAI) -> None:
    options = {"logprobs": True, "top_logprobs": 100, "max_completion_tokens": 60,
               "extra_body": {"ignore_eos": True}}  # fmt: skip
    whole = chat(client, **options).choices[0].logprobs.content
    assert len(whole) == 60
    assert {len(entry.top_logprobs) for entry in whole} == {100}
    streamed = [
        entry
        for chunk in chat(client, **options, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole


def test_pieces_of_characters(client: OpenAI) -> None:
    prompt = "\N{FOX FACE}\N{TURTLE}\N{SNAKE}" * 4 + "\N{FOX FACE}"
    options = {"model": MODEL, "prompt": prompt, "max_tokens": 30, "temperature": 0}
    choice = client.completions.create(**options, logprobs=3).choices[0]
    data = [
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:") else token.encode()
        for token in choice.logprobs.tokens
    ]  # fmt: skip
    assert any(token.startswith("bytes:\\x") for token in choice.logprobs.tokens)
    assert b"".join(data).decode(errors="replace") == choice.text
    for i, offset in enumerate(choice.logprobs.text_offset):
        assert offset == len(b"".join(data[:i]).decode(errors="ignore"))
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs)
    chunks = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(chunks) == choice.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chunks[:-1])


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The capital of France is", "1 2 3 4"], max_tokens=4, temperature=0,
        logprobs=2, n=2,
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert "Paris" in answer.choices[0].text
    assert "5" in answer.choices[2].text
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert answer.choices[1].logprobs == logprobs
    stream = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_json_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "colour": {"enum": ["red", "green"]},
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(3):
        answer = chat(
            client, response_format=form, max_completion_tokens=80, temperature=1.5, seed=seed
        )
        person = json.loads(answer.choices[0].message.content)
        assert person.keys() == {"name", "age", "colour"}
        assert 0 <= person["age"] <= 150
        assert person["colour"] in ("red", "green")
        assert answer.choices[0].finish_reason == "stop"


class Person(BaseModel):
    name: Annotated[str, Field(max_length=12)]
    age: int


def test_the_client_s_own_helpers(client: OpenAI) -> None:
    """They parse answers into classes, and put streams together again."""
    options = {"model": MODEL, "messages": ASK, "temperature": 0, "max_completion_tokens": 80}
    parsed = client.chat.completions.parse(**options, response_format=Person)
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person)
    with client.chat.completions.stream(**options, response_format=Person) as stream:
        assert {"content.delta", "content.done"} <= {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == person
    tools = [openai.pydantic_function_tool(Person)]
    with client.chat.completions.stream(
        **options, tools=tools, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        assert "tool_calls.function.arguments.delta" in {event.type for event in stream}
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)
    asked = {"model": MODEL, "input": ASK[0]["content"], "temperature": 0, "max_output_tokens": 80}
    with client.responses.stream(**asked, text_format=Person) as stream:
        assert "response.output_text.delta" in {event.type for event in stream}
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_choices_in_a_stream_of_json_do_not_mix(client: OpenAI) -> None:
    schema = Person.model_json_schema() | {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    texts = {0: "", 1: "", 2: ""}
    chunks = chat(client, n=3, seed=4, temperature=1.5, response_format=form, logprobs=True,
                  max_completion_tokens=90, stream=True)  # fmt: skip
    counts = dict.fromkeys(texts, 0)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert all(Person.model_validate_json(text) for text in texts.values())
    assert all(count > 5 for count in counts.values())
    assert len(set(texts.values())) > 1


def test_json_object(client: OpenAI) -> None:
    answer = chat(
        client, response_format={"type": "json_object"}, max_completion_tokens=400, seed=1,
        temperature=1, frequency_penalty=1,
    )  # fmt: skip
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool_is_called_when_it_must_be(client: OpenAI, choice) -> None:
    options = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False,
               "max_completion_tokens": 60}  # fmt: skip
    answer = chat(client, **options).choices[0]
    [call] = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    streamed = [
        chunk.choices[0].delta.tool_calls[0]
        for chunk in chat(client, **options, stream=True)
        if chunk.choices[0].delta.tool_calls
    ]
    assert streamed[0].function.name == "get_weather"
    assert streamed[0].id.startswith("call_")
    assert "".join(one.function.arguments for one in streamed) == call.function.arguments
    assert len(streamed) > 3


def test_a_tool_conversation_goes_on(client: OpenAI, server: Server) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}  # fmt: skip
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 25 degrees"},
    ]
    for choice in ("none", "auto"):
        answer = chat(client, messages=messages, tools=[WEATHER], tool_choice=choice)
        assert answer.choices[0].message.content
    counted = server.post("/tokenize", {"messages": messages}).json()["count"]
    assert chat(client, messages=messages).usage.prompt_tokens == counted


def test_embeddings(client: OpenAI) -> None:
    texts = ["a small cat", "a little kitten", "the stock market fell sharply on Monday"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (3, 576)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    cat, kitten, market = vectors
    assert cat @ kitten > cat @ market
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(cat.tolist(), abs=1e-6)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_responses(client: OpenAI) -> None:
    options = {"model": MODEL, "input": ASK[0]["content"], "temperature": 0}
    answer = client.responses.create(**options, max_output_tokens=24)
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    cut = client.responses.create(**options, max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"
    stream = list(client.responses.create(**options, max_output_tokens=24, stream=True))
    assert [event.sequence_number for event in stream] == list(range(len(stream)))
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == stream[-1].response.output_text == answer.output_text
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "flag", "schema": schema}}
    flag = client.responses.create(**options, max_output_tokens=24, text=form)
    assert json.loads(flag.output_text).keys() == {"a"}


def test_tokens(server: Server) -> None:
    tokens = server.post("/tokenize", {"text": "Hello <|im_end|>"}).json()
    special = server.post("/tokenize", {"text": "Hello <|im_end|>", "special": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) > special["count"]
    text = server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["text"]
    assert text == "Hello <|im_end|>"
    turns = server.post("/tokenize", {"messages": ASK}).json()
    answer = server.post(
        "/v1/chat/completions", {"messages": ASK, "max_completion_tokens": 1}
    ).json()
    assert turns["count"] == answer["usage"]["prompt_tokens"]


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unknown:
        chat(client, extra_body={"prediction": {}})
    assert unknown.value.param == "prediction"
    assert "not supported" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"
