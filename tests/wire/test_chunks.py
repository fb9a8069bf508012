"""Chunks to deltas: the documented shapes, and every wrong type in every place."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.wire.chunks import Chunk, Delta, DeltaKind, MalformedChunk, Usage, decode_chunk, with_text


def chunk_of(delta: Any, **fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **fields}).encode()


def content(text: str) -> Delta:
    return Delta(DeltaKind.CONTENT, text)


@pytest.mark.parametrize("text", ["Hel", " lo", "\n", "é中😀", "\u2028\u2029\x85\x0b\x0c", '"\\', "\r\n", "0", "\x00"])
def test_content_is_passed_on_exactly(text: str) -> None:
    assert decode_chunk(chunk_of({"content": text})).deltas == (content(text),)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_read_from_either_spelling(name: str) -> None:
    assert decode_chunk(chunk_of({name: "hm"})).deltas == (Delta(DeltaKind.REASONING, "hm"),)


def test_reasoning_sent_under_both_names_is_told_once_and_before_the_content() -> None:
    deltas = decode_chunk(chunk_of({"reasoning": "hm", "reasoning_content": "hm", "content": "so"})).deltas
    assert deltas == (Delta(DeltaKind.REASONING, "hm"), content("so"))


def test_a_tool_call_is_a_delta_without_text() -> None:
    """It stops the first-token clock, but the browser's stream has no event for it."""
    assert decode_chunk(chunk_of({"tool_calls": [{"index": 0}]})).deltas == (Delta(DeltaKind.OTHER, ""),)


OTHERS = [{"refusal": "no"}, {"function_call": {"name": "f"}}, {"audio": {"data": "…"}}, {"content": ["a"]}]


@pytest.mark.parametrize("delta", OTHERS)
def test_what_only_openais_own_clients_can_read_counts_for_them_alone(delta: Any) -> None:
    """Section 5: their face passes it on as it comes; section 3 has no event for it, so there it is silence."""
    assert decode_chunk(chunk_of(delta), verbatim=True).deltas == (Delta(DeltaKind.OTHER, ""),)
    assert decode_chunk(chunk_of(delta)).deltas == ()


@pytest.mark.parametrize(
    "delta",
    [
        None, {}, [], "text", 7, {"role": "assistant"}, {"content": None}, {"content": ""}, {"content": 7},
        {"content": ["a"]}, {"content": {"text": "a"}}, {"reasoning": ""}, {"reasoning": 1}, {"tool_calls": []},
        {"tool_calls": "x"}, {"refusal": None}, {"audio": {"data": "…"}}, {str(n): n for n in range(100)},
    ],
)  # fmt: skip
def test_a_delta_without_content_says_nothing(delta: Any) -> None:
    assert decode_chunk(chunk_of(delta)) == Chunk()


@pytest.mark.parametrize(
    "choices", [None, [], {}, "x", [None], [7], [[]], [{"index": 1, "delta": {"content": "b"}}], [{"delta": 1}]]
)
def test_choices_of_a_wrong_shape_and_other_choices_say_nothing(choices: Any) -> None:
    assert decode_chunk(json.dumps({"choices": choices}).encode()).deltas == ()


@pytest.mark.parametrize("index", [None, "0", 0.0, False, []])
def test_an_index_of_a_wrong_type_counts_as_absent(index: Any) -> None:
    wire = json.dumps({"choices": [{"index": index, "delta": {"content": "a"}}]}).encode()
    assert decode_chunk(wire).deltas == (content("a"),)


def test_a_chunk_without_choices_says_nothing() -> None:
    assert decode_chunk(b'{"object":"chat.completion.chunk"}') == Chunk()


@pytest.mark.parametrize(
    ("reason", "read"),
    [("stop", "stop"), ("length", "length"), ("new_kind", "new_kind"), ("", None), (None, None), (7, None), ([], None)],
)
def test_a_finish_reason_is_any_text(reason: Any, read: str | None) -> None:
    wire = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}).encode()
    assert decode_chunk(wire).finish_reason == read


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 2}, Usage(3, 2)),
        ({"prompt_tokens": 0}, Usage(0, None)),
        ({"prompt_tokens": -1, "completion_tokens": "2"}, Usage(None, None)),
        ({"prompt_tokens": True, "completion_tokens": 2.0}, Usage(None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 2**53}, Usage(None, None)),
        (None, None),
        ([], None),
        ("3", None),
    ],
)
def test_usage_is_counts_or_nothing(usage: Any, read: Usage | None) -> None:
    assert decode_chunk(json.dumps({"choices": [], "usage": usage}).encode()).usage == read


@pytest.mark.parametrize("error", [{"message": "no"}, "no", {}])
def test_an_error_object_is_an_error_whatever_it_holds(error: Any) -> None:
    assert decode_chunk(json.dumps({"error": error}).encode()).error == error


@pytest.mark.parametrize("error", [None, False, "", 0])
def test_an_error_field_that_names_none_is_none(error: Any) -> None:
    assert decode_chunk(chunk_of({"content": "a"}, error=error)).deltas == (content("a"),)


def test_half_a_surrogate_pair_is_kept() -> None:
    """Some endpoints cut a character over two deltas; each half must reach the browser, which joins them."""
    assert decode_chunk(b'{"choices":[{"delta":{"content":"\\ud83d"}}]}').deltas == (content("\ud83d"),)


def test_invalid_utf8_becomes_the_replacement_character() -> None:
    assert decode_chunk(b'{"choices":[{"delta":{"content":"a\xffb"}}]}').deltas == (content("a\ufffdb"),)


def test_a_number_that_json_does_not_know_costs_nothing() -> None:
    """vLLM has sent NaN log-probabilities."""
    assert decode_chunk(b'{"choices":[{"delta":{"content":"a"},"logprobs":NaN}]}').deltas == (content("a"),)


@pytest.mark.parametrize(
    "wire",
    [b"", b"{", b"[1]", b"7", b'"x"', b"null", b"[done]", b" [DONE] ", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000],
)
def test_what_is_no_json_object_is_malformed(wire: bytes) -> None:
    with pytest.raises(MalformedChunk):
        decode_chunk(wire)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "reasoning",
                    "tool_calls",
                    "finish_reason",
                    "usage",
                    "index",
                    "prompt_tokens",
                    "error",
                    "model",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
)


@given(json_values)
def test_no_field_of_any_type_breaks_the_reader(value: Any) -> None:
    """A quirk may cost a field, never the answer."""
    try:
        chunk = decode_chunk(json.dumps(value).encode())
    except MalformedChunk:
        assert not isinstance(value, dict)
    else:
        assert all(isinstance(delta.text, str) for delta in chunk.deltas)


@given(st.binary())
def test_bytes_of_any_kind_are_a_chunk_or_malformed(wire: bytes) -> None:
    with contextlib.suppress(MalformedChunk):
        assert isinstance(decode_chunk(wire), Chunk)


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 0, "delta": {"content": "Hello"}}],
        [{"delta": {"content": "Hello"}}],
        [{"index": 1, "x": 1}, {"index": 0, "delta": {"content": "Hello"}}],
        [None, {"index": 0, "delta": {}}, {"index": 0, "delta": {"content": "Hello"}}],
    ],
    ids=["alone", "without an index", "behind another choice", "behind what is no content"],
)
def test_a_text_is_replaced_where_it_stands(choices: list[Any]) -> None:
    """Also in the event as it came."""
    data = json.dumps({"choices": choices}).encode()
    chunk = decode_chunk(data)._replace(wire=b"data: " + data + b"\n\n")
    wire = with_text(chunk, "lo").wire
    assert (
        wire
        == b"data: " + json.dumps({"choices": choices}, separators=(",", ":")).replace("Hello", "lo").encode() + b"\n\n"
    )
    assert with_text(chunk._replace(wire=b""), "lo").wire == b""
