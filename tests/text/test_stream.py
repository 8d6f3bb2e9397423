"""Text that leaves token by token: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import llama_metadata

from headrace.errors import RequestError, TokenizerError
from headrace.text.detokenizer import IncrementalDecoder
from headrace.text.stop import StopStrings
from headrace.text.tokenizer import Tokenizer

LLAMA2 = Tokenizer.from_metadata(llama_metadata({"▁": -1.0, "▁a": -2.0, "é": -1.0, "a": -3.0}))


def pieces(
    tokenizer: Tokenizer, ids: list[int], *, special: bool = False, continuing: bool = False
) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, special=special, continuing=continuing)
    return [*map(decoder.push, ids), decoder.flush()]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), special=st.booleans(), continuing=st.booleans())
def test_pieces_concatenate_to_the_whole(
    smollm2: Tokenizer, gemma3: Tokenizer, data: st.DataObject, special: bool, continuing: bool
) -> None:
    tokenizer = data.draw(st.sampled_from([smollm2, gemma3, LLAMA2]))
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.n_vocab, 500) - 1), max_size=20))
    got = pieces(tokenizer, ids, special=special, continuing=continuing)
    whole = tokenizer.decode(ids, special=special, continuing=continuing)
    assert "".join(got) == whole
    raw = [tokenizer.token_bytes(i) for i in ids if special or not tokenizer.is_control(i)]
    assert whole.lstrip(" ") == b"".join(raw).decode("utf-8", "replace").lstrip(" ")


def test_a_character_is_shown_when_it_is_whole(gemma3: Tokenizer) -> None:
    ids = [238 + byte for byte in "é🙂".encode()]  # Gemma's byte tokens begin at 238
    assert gemma3.token_text(238) == "<0x00>"
    assert pieces(gemma3, ids) == ["", "é", "", "", "", "🙂", ""]


def test_invalid_bytes_become_replacement_characters(gemma3: Tokenizer) -> None:
    ids = [238 + byte for byte in b"\xf0\x9fA\xff\xe2\x82"]
    assert pieces(gemma3, ids) == ["", "", "\ufffdA", "\ufffd", "", "", "\ufffd"]


def test_leading_space_of_llama2() -> None:
    a = LLAMA2.encode("a")
    assert pieces(LLAMA2, a + a) == ["a", " a", ""]
    assert pieces(LLAMA2, a, continuing=True) == [" a", ""]


def test_control_tokens_are_hidden_unless_asked(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>hi", special=True)
    assert "".join(pieces(smollm2, ids)) == "hi"
    assert "".join(pieces(smollm2, ids, special=True)) == "<|im_start|>hi"
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        IncrementalDecoder(smollm2).push(-1)


# --- stop strings ---------------------------------------------------------------------------------


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at every beginning of the text in turn; cut at the longest stop string it ends with."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=1000, deadline=None)
@given(
    parts=st.lists(st.text("ab ", max_size=4), max_size=12),
    stops=st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_are_the_naive_search(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    expected, stop = naive("".join(parts), stops)
    shown, seen = "", ""
    for part in parts:
        shown += matcher.push(part)
        seen += part
        assert expected.startswith(shown)
        if matcher.matched is None:
            # Nothing is held back without reason: the rest could still become a stop string.
            held = seen[len(shown) :]
            assert not held or any(s.startswith(held) and s != held for s in stops)
    assert matcher.matched == stop
    assert shown + matcher.flush() == expected


def test_after_the_match_nothing_is_shown() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.push(p) for p in ("a E", "N", "D b", " c")] == ["a ", "", "", ""]
    assert matcher.matched == "END"
    assert matcher.flush() == ""


def test_without_stop_strings_all_text_passes() -> None:
    matcher = StopStrings([])
    assert matcher.push("anything") == "anything"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match=r"stop.*empty"):
        StopStrings(["a", ""])


def test_many_stop_strings_and_a_long_text() -> None:
    started = time.perf_counter()
    matcher = StopStrings([f"stop{i}" for i in range(20_000)])
    text = "sto" * 50_000
    assert matcher.push(text) + matcher.flush() == text
    slow = StopStrings(["a" * 5000 + "b"])  # a search that starts over would take 10⁹ steps
    assert slow.push("a" * 200_000) + slow.flush() == "a" * 200_000
    assert time.perf_counter() - started < 10
