"""Token ids exactly as llama.cpp's, and hostile vocabularies and texts."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import gpt2_metadata, llama_metadata

from headrace.errors import TokenizerError
from headrace.text.bpe import BYTE_TO_CHAR
from headrace.text.pretokenizer import PRE_TOKENIZERS
from headrace.text.tokenizer import Tokenizer

Golden = tuple[Tokenizer, list[dict[str, Any]]]


def test_ids_are_llama_cpps(golden: Golden) -> None:
    tokenizer, cases = golden
    assert len(cases) >= 18
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["plain"], case["text"]
        assert tokenizer.encode(case["text"], special=True) == case["special"], case["text"]


def test_decoding_gives_the_text_back(golden: Golden) -> None:
    tokenizer, cases = golden
    for case in cases:
        assert tokenizer.decode(case["plain"]) == case["text"]
        assert tokenizer.decode(case["special"], special=True) == case["text"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF), max_size=40))
def test_any_text_survives(deepseek: Tokenizer, gemma3: Tokenizer, text: str) -> None:
    for tokenizer in (deepseek, gemma3):
        ids = tokenizer.encode(text)
        shown = text.replace("▁", " ") if tokenizer is gemma3 else text  # SentencePiece's space
        assert tokenizer.decode(ids) == shown
        assert not any(tokenizer.is_control(i) for i in ids)


def test_control_text_is_text_unless_asked(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    for tokenizer, text in ((smollm2, "<|im_end|>"), (gemma3, "<end_of_turn>")):
        control = tokenizer.token_id(text)
        assert control is not None
        assert control not in tokenizer.encode(f"a{text}b")
        assert tokenizer.encode(f"a{text}b", special=True).count(control) == 1
        assert tokenizer.decode([control]) == ""
        assert tokenizer.decode([control], special=True) == text
        assert control in tokenizer.end_ids


def test_special_ids(smollm2: Tokenizer, gemma3: Tokenizer, deepseek: Tokenizer) -> None:
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.add_bos, smollm2.n_vocab) == (
        1,
        2,
        False,
        49152,
    )
    assert (gemma3.bos_id, gemma3.eos_id, gemma3.add_bos, gemma3.n_vocab) == (2, 1, True, 262144)
    assert {gemma3.token_text(i) for i in gemma3.end_ids} == {"<eos>", "<end_of_turn>"}
    assert {smollm2.token_text(i) for i in smollm2.end_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert deepseek.eos_id in deepseek.end_ids


def test_ends_whatever_type_the_converter_wrote() -> None:
    extra = {"<|im_end|>": 1, "<end_of_turn>": 4, "</s>": 4, "<eos>": 3}
    tokenizer = Tokenizer.from_metadata(gpt2_metadata([], extra=extra))
    ends = {"<|im_end|>", "<end_of_turn>", "<eos>"}  # "</s>" may be an HTML tag
    assert {tokenizer.token_text(i) for i in tokenizer.end_ids} == ends
    assert not tokenizer.end_ids & set(tokenizer.encode("<|im_end|><end_of_turn><eos>"))
    harmony = {"<|end|>": 3, "<|return|>": 3, "<|call|>": 3}
    tokenizer = Tokenizer.from_metadata(gpt2_metadata([], extra=harmony))
    assert {tokenizer.token_text(i) for i in tokenizer.end_ids} == {"<|return|>", "<|call|>"}


def test_bos_once_and_only_where_the_file_asks(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert gemma3.encode("hi", bos=True) == [2, *gemma3.encode("hi")]
    assert gemma3.encode("<bos>hi", bos=True, special=True) == [2, *gemma3.encode("hi")]
    assert gemma3.encode("", bos=True) == [2]
    assert smollm2.encode("hi", bos=True) == smollm2.encode("hi")


def test_longest_verbatim_token_wins_wherever_it_begins() -> None:
    """llama.cpp cuts at the longest tokens first, though a shorter one begins earlier."""
    tokenizer = Tokenizer.from_metadata(gpt2_metadata([], extra={"ab": 4, "bcd": 4}))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abcdab")] == ["a", "bcd", "ab"]


def test_a_missing_byte_is_dropped_and_not_merged_across(smollm2: Tokenizer) -> None:
    assert smollm2.encode("\x04") == []
    assert len(smollm2.encode("!!")) == 1
    assert smollm2.encode("!\x04!") == 2 * smollm2.encode("!")


def test_ignore_merges_takes_whole_words() -> None:
    extra = {"abc": 1}  # a token that no merge makes
    llama3 = Tokenizer.from_metadata(gpt2_metadata(["a b"], "llama-bpe", extra))
    qwen2 = Tokenizer.from_metadata(gpt2_metadata(["a b"], "qwen2", extra))
    assert [llama3.token_text(i) for i in llama3.encode("abc")] == ["abc"]
    assert [qwen2.token_text(i) for i in qwen2.encode("abc")] == ["ab", "c"]


def test_plain_text_never_becomes_a_control_token_that_is_a_word() -> None:
    metadata = gpt2_metadata(["s t"], "llama-bpe", {"stop": 3, "stay": 2})
    tokenizer = Tokenizer.from_metadata(metadata)
    for word in ("stop", "stay"):
        assert [tokenizer.token_text(i) for i in tokenizer.encode(word)] == ["st", *word[2:]]


WORDS = {
    "default": ("x=1234 (I'll) ok", ["x", "=", "123", "4", " ", "(", "I", "'", "ll", ")", " ok"]),
    "llama-bpe": ("don'T 12345 a\n\n b", ["don", "'T", " ", "123", "45", " a", "\n\n", " b"]),
    "qwen2": ("don'T 12345 a/\n", ["don", "'T", " ", "1", "2", "3", "4", "5", " a", "/\n"]),
    "qwen35": ("e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
    "tekken": ("camelCase 12 HTTPServer", ["camel", "Case", " ", "1", "2", " HTTPServer"]),
    "gpt-4o": ("camelCase's 1234", ["camel", "Case's", " ", "123", "4"]),
    "smollm": ("don't 12  x", ["don", "'t", " ", "1", "2", " ", " x"]),
    "gpt-2": ("don't 12  x", ["don", "'t", " 12", " ", " x"]),
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_as_the_vocabulary_was_trained(pre: str) -> None:
    """Every pair of characters merges here, so that tokens are exactly words."""
    text, words = WORDS[pre]
    coded = ["".join(BYTE_TO_CHAR[b] for b in word.encode()) for word in words]
    # Merges that build each word from the left, and one across each boundary that must not occur.
    merges = [f"{w[:i]} {w[i]}" for w in coded for i in range(1, len(w))]
    merges += [f"{a} {b}" for a, b in pairwise(coded)]
    tokenizer = Tokenizer.from_metadata(
        gpt2_metadata(merges, pre, {"<s>": 3}, **{"tokenizer.ggml.bos_token_id": 0})
    )
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


def test_every_known_pre_compiles() -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_metadata(gpt2_metadata(["a b"], pre))
        assert tokenizer.decode(tokenizer.encode("ab é 12\n")) == "ab é 12\n"


# --- SentencePiece, against the algorithm written out ------------------------------------------

PIECES = {
    **dict.fromkeys("abc▁é", -9.0),
    "ab": -1.0,
    "bc": -0.5,
    "▁a": -2.0,
    "abc": -3.0,
    "▁ab": -2.5,
    "▁▁": -4.0,
    "ca": -0.5,
}


def spelled_out(text: str, *, prefix: bool = True) -> list[str]:
    """SentencePiece BPE by hand: merge the best adjacent pair, leftmost of equals, until none is
    a piece; bytes for what is none."""
    symbols = list(((" " if prefix and text else "") + text).replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        ranked = [(-PIECES[pair], i) for i, pair in enumerate(pairs) if pair in PIECES]
        if not ranked:
            break
        i = min(ranked)[1]
        symbols[i : i + 2] = [pairs[i]]
    return [
        piece
        for s in symbols
        for piece in ([s] if s in PIECES else [f"<0x{byte:02X}>" for byte in s.encode()])
    ]


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc é\nx\x00", max_size=20), prefix=st.booleans())
def test_sentencepiece_is_the_algorithm(text: str, prefix: bool) -> None:
    tokenizer = LLAMA[prefix]
    assert [tokenizer.token_text(i) for i in tokenizer.encode(text)] == spelled_out(
        text, prefix=prefix
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text


LLAMA = {
    prefix: Tokenizer.from_metadata(
        llama_metadata(PIECES, **{"tokenizer.ggml.add_space_prefix": prefix})
    )
    for prefix in (False, True)
}


def test_llama2_defaults_and_spaces() -> None:
    tokenizer = Tokenizer.from_metadata(llama_metadata(PIECES))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    spell = [tokenizer.token_text(i) for i in tokenizer.encode("ab</s>ab", special=True, bos=True)]
    assert spell == ["<s>", "▁ab", "</s>", "▁ab"]  # a space after every verbatim token
    ab = tokenizer.encode("ab")
    assert tokenizer.decode(ab) == "ab"
    assert tokenizer.decode(ab, continuing=True) == " ab"
    assert tokenizer.encode("") == []


def test_without_all_bytes_the_unknown_token_stands_in() -> None:
    metadata = llama_metadata({"a": -1.0})
    metadata["tokenizer.ggml.token_type"][3] = 1  # <0x00> is no byte any more
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("ax")[-1] == 0


# --- hostile vocabularies -----------------------------------------------------------------------


def broken(**changes: Any) -> dict[str, Any]:
    metadata = gpt2_metadata(["a b", "ab c"], extra={"<s>": 3})
    for key, value in changes.items():
        metadata["tokenizer." + key.replace("__", ".")] = value
    return metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "bert"}, r"tokenizer.ggml.model is 'bert'.*gpt2 and llama"),
        ({"ggml__model": None}, r"tokenizer.ggml.model"),
        ({"ggml__pre": "klingon"}, r"'klingon'.*Known: .*llama-bpe.*qwen2"),
        ({"ggml__pre": None}, r"tokenizer.ggml.pre is missing"),
        ({"ggml__tokens": []}, r"tokenizer.ggml.tokens is empty"),
        ({"ggml__tokens": None}, r"tokenizer.ggml.tokens is missing"),
        ({"ggml__tokens": [1, 2]}, r"tokenizer.ggml.tokens must be an array of strings"),
        ({"ggml__token_type": np.ones(3, "i4")}, r"token_type has 3 entries for 259 tokens"),
        ({"ggml__token_type": np.full(259, 9, "i4")}, r"token_type\[0\] is 9"),
        ({"ggml__token_type": np.full(259, 6, "i4")}, r"token 0 has type BYTE but"),
        ({"ggml__merges": None}, r"tokenizer.ggml.merges is missing"),
        ({"ggml__merges": ["ab"]}, r"'ab', which has no space"),
        ({"ggml__merges": ["a zz"]}, r"needs the token 'zz'"),
        ({"ggml__merges": ["a c"]}, r"needs the token 'ac'"),
        ({"ggml__bos_token_id": 259}, r"bos_token_id is 259, outside the vocabulary of 259"),
        ({"ggml__eos_token_id": 2**63}, r"eos_token_id is 9223372036854775808, outside"),
        ({"ggml__eot_token_id": -1}, r"eot_token_id is -1, outside"),
        ({"ggml__unknown_token_id": 1.5}, r"unknown_token_id must be an integer"),
        ({"ggml__add_bos_token": True}, r"add_bos_token is true but .*bos_token_id is missing"),
        ({"ggml__add_bos_token": "yes"}, r"add_bos_token must be true or false"),
    ],
)
def test_broken_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(broken(**changes)).prepare()


def test_duplicate_and_empty_tokens() -> None:
    metadata = broken()
    metadata["tokenizer.ggml.tokens"][258] = "ab"
    with pytest.raises(TokenizerError, match="ids 256 and 258 are both the token 'ab'"):
        Tokenizer.from_metadata(metadata)
    for empty in (
        gpt2_metadata([], extra={"": 1, "<s>": 3}),
        llama_metadata({"a": 0.0, "▁": 0.0, "": 0.0}),
    ):
        empty["tokenizer.ggml.tokens"][-1] = ""
        tokenizer = Tokenizer.from_metadata(empty)
        assert tokenizer.decode(tokenizer.encode("a[EMPTY_1]")) == "a[EMPTY_1]"
        assert tokenizer.token_bytes(tokenizer.n_vocab - 1) == b""


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores is missing"),
        (np.zeros(3, "f4"), "scores has 3 entries for 260"),
        (np.full(260, np.nan, "f4"), "not finite"),
        (["x"] * 260, "must be an array of numbers"),
    ],
)
def test_broken_scores_are_named(scores: Any, message: str) -> None:
    metadata = llama_metadata({"a": 0.0}) | {"tokenizer.ggml.scores": scores}
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(metadata)


def test_ids_outside_the_vocabulary(smollm2: Tokenizer) -> None:
    for bad in (-1, 49152, 2**40):
        with pytest.raises(TokenizerError, match=f"token id {bad} is outside.*49152"):
            smollm2.decode([bad])


def test_lone_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D at character 1"):
        smollm2.encode("a\ud83d")


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "\n\na " * 50_000, "é世" * 50_000])
def test_a_megabyte_word_takes_time_in_proportion(golden: Golden, text: str) -> None:
    """Around a second here; a quadratic encoder would need hours."""
    tokenizer, _ = golden
    tokenizer.prepare()
    started = time.perf_counter()
    ids = tokenizer.encode(text, special=True)
    assert time.perf_counter() - started < 20
    assert tokenizer.decode(ids) == text


def test_building_is_safe_from_many_threads(smollm2_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(smollm2_metadata)
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(tokenizer.encode("Hello, world!")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[19556, 28, 905, 17]] * 8
