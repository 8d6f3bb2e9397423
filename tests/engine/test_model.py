"""The public face, over a real small model."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import headrace
from headrace.errors import (
    ContextOverflowError,
    DeviceError,
    GGUFError,
    HubError,
    RequestError,
)

pytestmark = pytest.mark.real_model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model(smollm2_path: Path):
    with headrace.load(smollm2_path, context=512) as model:
        yield model


def test_generate(model) -> None:
    completion = model.generate(PROMPT, max_tokens=12, temperature=0, logprobs=2)
    assert completion.text.startswith(" Paris")
    assert completion.finish_reason == "length"
    assert len(completion.tokens) == len(completion.logprobs) == 12
    assert model.detokenize(completion.tokens) == completion.text
    for entry in completion.logprobs:
        assert entry.top[0] == (entry.token, entry.logprob)  # greedy takes the likeliest
    assert completion.timings.prompt_tokens == len(model.tokenize(PROMPT, bos=True))


def test_a_prompt_of_ids_is_run_as_it_is(model) -> None:
    ids = model.tokenize(PROMPT, bos=True)
    options = {"max_tokens": 8, "temperature": 0}
    assert model.generate(ids, **options).tokens == model.generate(PROMPT, **options).tokens
    assert model.generate(np.array(ids), **options).tokens == model.generate(ids, **options).tokens


def test_stream_is_generate_in_pieces(model) -> None:
    options = {"max_tokens": 40, "seed": 11}
    stream = model.stream(PROMPT, **options)
    pieces = list(stream)
    assert all(pieces)
    assert len(pieces) > 10
    whole = model.generate(PROMPT, **options)
    assert "".join(pieces) == stream.completion.text == whole.text
    assert whole.tokens == stream.completion.tokens
    assert list(stream) == []


def test_seeds_and_defaults(model) -> None:
    texts = {model.generate(PROMPT, max_tokens=20, seed=seed).text for seed in (1, 1, 2, 3)}
    assert len(texts) == 3
    fresh = {model.generate(PROMPT, max_tokens=20).text for _ in range(3)}
    assert len(fresh) > 1


def test_two_streams_in_turns_and_in_threads_give_the_text_of_one(model) -> None:
    prompts = [PROMPT, "Once upon a time", "def main():", "2 + 2 ="]
    alone = [model.generate(p, max_tokens=24, temperature=0).text for p in prompts]
    streams = [model.stream(p, max_tokens=24, temperature=0) for p in prompts]
    texts = [""] * len(prompts)
    for _ in range(24):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == alone

    def work(i: int) -> None:
        texts[i] = model.generate(prompts[i], max_tokens=24, temperature=0).text

    texts = [""] * len(prompts)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == alone


def test_stop_strings_end_the_text_before_them(model) -> None:
    whole = model.generate(PROMPT, max_tokens=30, temperature=0).text
    stop = whole[9:14]
    for chosen in (stop, [stop, "never"]):
        completion = model.generate(PROMPT, max_tokens=30, temperature=0, stop=chosen)
        assert completion.text == whole[: whole.index(stop)]
        assert completion.finish_reason == "stop"


def test_chat_computes_only_what_is_new(model) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    first = model.chat(messages, max_tokens=40, temperature=0)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And one more?"},
    ]
    n_prompt = len(model.chat_template.encode_chat(messages))
    stream = model.stream_chat(messages, max_tokens=20, temperature=0)
    text = "".join(stream)
    timings = stream.completion.timings
    assert timings.prompt_tokens == n_prompt
    # Known: the first prompt and the answer. New: its end, and the question.
    assert timings.cached_tokens >= first.timings.prompt_tokens + len(first.tokens) - 1
    model.engine.pool.__init__(model.engine.pool.n_pages)  # forget everything
    assert model.chat(messages, max_tokens=20, temperature=0).text == text


def test_closing_or_dropping_a_stream_frees_its_pages(model) -> None:
    for drop in (False, True):
        stream = model.stream(PROMPT)
        next(stream)
        assert model.engine.pool.n_held == 1
        if drop:
            del stream
            gc.collect()
        else:
            stream.close()
            stream.close()
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.text
            assert list(stream) == []
        assert model.engine.pool.n_held == 0


def test_ctrl_c_ends_the_answer_and_the_model_goes_on(model, monkeypatch) -> None:
    stream = model.stream(PROMPT, temperature=0)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(
            model.engine.runner, "step", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert model.engine.pool.n_held == 0
    assert model.generate(PROMPT, max_tokens=2, temperature=0).text.startswith(" Paris")


def test_errors_name_what_is_wrong(model) -> None:
    with pytest.raises(RequestError, match="temperature"):
        model.generate(PROMPT, temperature=float("nan"))
    with pytest.raises(TypeError, match="temprature"):
        model.generate(PROMPT, temprature=1)
    with pytest.raises(ContextOverflowError, match="context of 512"):
        model.generate("word " * 600)
    with pytest.raises(RequestError, match="empty"):
        model.generate([])
    with model.stream(PROMPT) as stream, pytest.raises(RuntimeError):
        _ = stream.completion


def test_logits(model) -> None:
    ids = model.tokenize(PROMPT, bos=True)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.n_vocab)
    assert model.detokenize([int(logits[-1].argmax())]) == " Paris"


def test_loading_what_cannot_be_loaded(tmp_path: Path, smollm2_path: Path) -> None:
    with pytest.raises(HubError):
        headrace.load("no-such-model-anywhere")
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        headrace.load(smollm2_path, "tpu")
    with pytest.raises(RequestError, match="context must be"):
        headrace.load(smollm2_path, context=10**9)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(GGUFError):
        headrace.load(bad)


def test_a_closed_model_says_so(smollm2_path: Path) -> None:
    model = headrace.load(smollm2_path, context=64)
    stream = model.stream(PROMPT)
    next(stream)
    model.close()
    model.close()
    assert stream.completion.finish_reason == "cancelled"
    with pytest.raises(GGUFError, match="closed"):
        model.generate(PROMPT)


def test_importing_headrace_imports_nothing_heavy() -> None:
    code = (
        "import sys, headrace; dir(headrace); "
        "sys.exit(bool({'numpy', 'numba', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = headrace.no_such_name
    for name in headrace.__all__:
        assert getattr(headrace, name).__name__ == name
