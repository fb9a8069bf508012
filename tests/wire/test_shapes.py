"""What is known of an endpoint's events from other answers: what is taken to be known means what decoding would say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.wire.chunks import Chunk, Delta, DeltaKind, MalformedChunk, decode_chunk
from server.wire.shapes import KnownShapes
from server.wire.template import TokenTemplate

VLLM = '{"id":"chatcmpl-%s","object":"chat.completion.chunk","created":%d,"model":"%s","choices":%s}'
OPENAI = (
    '{"id":"chatcmpl-%s","object":"chat.completion.chunk","created":%d,"model":"%s","service_tier":"default",'
    '"system_fingerprint":null,"choices":%s,"usage":null}'
)
SPACED = '{"id": "%s", "object": "chat.completion.chunk", "created": %d, "model": "%s", "choices": %s}'
ENDPOINTS = pytest.mark.parametrize("frame", [VLLM, OPENAI, SPACED], ids=["vLLM", "OpenAI", "json.dumps"])

TOKEN = '[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]'
ROLE = '[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]'
STOP = '[{"index":0,"delta":{},"finish_reason":"stop"}]'


def shapes_of(frame: str) -> KnownShapes:
    """Known from an answer of the endpoint."""
    data = (frame % ("a", 1, "m-1", TOKEN % "Hello")).encode()
    template = TokenTemplate.learn(data, decode_chunk(data), b"data: " + data + b"\n\n")
    assert template is not None
    shapes = KnownShapes()
    shapes.remember(template)
    return shapes


def noted(shapes: KnownShapes, data: bytes) -> None:
    shapes.note(data, decode_chunk(data))


@ENDPOINTS
def test_the_frame_of_one_answers_tokens_is_that_of_the_next(frame: str) -> None:
    shapes = shapes_of(frame)
    noted(shapes, (frame % ("a", 1, "m-1", ROLE)).encode())
    first = (frame % ("b", 22, "m-2", ROLE)).encode()
    known = shapes.recognise(first)
    assert known is not None
    template, envelope = known
    assert first[envelope:].startswith(b'"choices":')
    assert template.model == "m-2"
    token = (frame % ("b", 22, "m-2", TOKEN % "é, you")).encode()
    assert template.text_of(token) == "é, you".encode()
    assert template.texts_of(b"data: " + token + b"\n\n") == ["é, you".encode()]
    assert template.text_of((frame % ("a", 1, "m-1", TOKEN % "x")).encode()) is None  # of the other answer


@ENDPOINTS
@pytest.mark.parametrize("choices", [ROLE, STOP, "[]"])
def test_an_event_without_text_says_the_same_in_each_answer(frame: str, choices: str) -> None:
    shapes = shapes_of(frame)
    data = (frame % ("b", 22, "m-2", choices)).encode()
    noted(shapes, data)
    again = (frame % ("c", 3, "m-3", choices)).encode()
    known = shapes.recognise(again)
    assert known is not None
    meaning = shapes.meaning_of(again[known[1] :])
    assert meaning is not None
    assert meaning._replace(model="m-3") == decode_chunk(again)


@pytest.mark.parametrize(
    "choices",
    [
        TOKEN % "Hi",
        '[],"usage":{"prompt_tokens":1,"completion_tokens":2}',
        '[{"index":0,"delta":{"reasoning":"hm"}}]',
        '[{"index":0,"delta":{"tool_calls":[{}]}}]',
        '[],"error":{"message":"no"}',
        '[],"model":"m-1"',
        '[],"mod\\u0065l":"m-1"',
        '[],"x":"' + "x" * 600 + '"',
    ],
    ids=["text", "usage", "reasoning", "tool call", "error", "model", "model, escaped", "long"],
)
def test_what_may_say_something_else_each_time_is_not_remembered(choices: str) -> None:
    shapes = shapes_of(VLLM)
    data = (VLLM % ("b", 22, "m-1", choices)).encode()
    noted(shapes, data)
    assert shapes.meaning_of(data[data.index(b'"choices"') :]) is None


@pytest.mark.parametrize(
    "envelope",
    [
        '{"id":"a","choices":',
        '{"id":"a","model":null,"choices":',
        '{"id":"a","model":"","choices":',
        '{"id":"a","model":"m","model":"n","choices":',
        '{"id":"a","model":"m\\u006d","choices":',
        '{"id":"a","model":"é","choices":',
        '{"id":"\\"","model":"m","choices":',
        '{"id":{"a":1},"model":"m","choices":',
        '{"id":01,"model":"m","choices":',
        '{"id":12345678901234567890,"model":"m","choices":',
        '{"id":"a","error":"no","model":"m","choices":',
        '{"id":"a","model":"m","usage":{"prompt_tokens":1},"choices":',
        '{"id":"a","model":"m","choices":[],"choices":',
        '[{"id":"a","model":"m","choices":',
        ' {"id":"a","model":"m","choices":',
        "no JSON",
        "",
    ],
)
def test_an_event_that_begins_in_another_way_is_not_recognised(envelope: str) -> None:
    shapes = shapes_of(VLLM)
    known = shapes.recognise((envelope + STOP + "}").encode())
    assert known is None or known[1] == len('{"id":"a","model":"m",')


@ENDPOINTS
@pytest.mark.parametrize("choices", [STOP, "[oops", '[],"model":null', TOKEN % "a\\nb"])
def test_an_answer_whose_first_event_has_to_be_decoded_is_not_recognised_by_it(frame: str, choices: str) -> None:
    """It may be malformed, or name another model."""
    shapes = shapes_of(frame)
    noted(shapes, (frame % ("a", 1, "m-1", ROLE)).encode())
    assert shapes.recognise((frame % ("b", 22, "m-2", choices)).encode()) is None
    assert shapes.recognise((frame % ("b", 22, "m-2", TOKEN % "plain")).encode()) is not None


def test_a_long_frame_is_not_remembered() -> None:
    """Each open answer would hold a copy of it."""
    frame = VLLM.removesuffix("}") + ',"echo":"' + "x" * 500 + '"}'
    assert shapes_of(frame).recognise((frame % ("b", 22, "m-2", TOKEN % "Hi")).encode()) is None


def test_nothing_is_known_before_an_answer_has_shown_it() -> None:
    shapes = KnownShapes()
    data = (VLLM % ("b", 22, "m-2", STOP)).encode()
    noted(shapes, data)
    assert shapes.recognise(data) is None
    assert shapes.meaning_of(STOP.encode() + b"}") is None


@pytest.mark.parametrize("behind", [',"model":"n"}', ',"\\u006d":1}'])
def test_a_frame_that_may_name_the_model_is_not_remembered(behind: str) -> None:
    """What it names in one answer is not what it has to name in the next."""
    data = (VLLM % ("a", 1, "m-1", TOKEN % "Hello")).removesuffix("}").encode() + behind.encode()
    template = TokenTemplate.learn(data, decode_chunk(data), b"data: " + data + b"\n\n")
    assert template is not None
    shapes = KnownShapes()
    shapes.remember(template)
    assert shapes.recognise(data) is None


def test_what_is_remembered_is_bounded() -> None:
    shapes = shapes_of(VLLM)
    datas = [(VLLM % ("b", 1, "m", f'[],"x":{number}')).encode() for number in range(1000)]
    for data in datas:
        noted(shapes, data)
    assert len(shapes._silent) <= 16
    assert shapes.meaning_of(b'"choices":[],"x":999}') == Chunk()


VALUES = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.sampled_from(['"choices":', 'm","choices":[', "\\", "error"])
)
FIELDS = st.lists(
    st.tuples(
        st.sampled_from(["id", "object", "created", "model", "system_fingerprint", "error", "usage", "choices", "x"]),
        st.one_of(VALUES, st.just([{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}])),
    ),
    max_size=6,
)


def written(fields: list[tuple[str, Any]], *, ascii_: bool) -> str:
    return ",".join(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=ascii_)}" for name, value in fields)


@given(FIELDS, FIELDS, st.booleans())
@example([("id", "x"), ("model", "m")], [("model", "n")], True)
def test_whatever_is_recognised_says_what_decoding_says(
    before: list[tuple[str, Any]], behind: list[tuple[str, Any]], ascii_: bool
) -> None:
    """Any fields, in any order, and more than once."""
    shapes = shapes_of(VLLM)
    joined = ",".join(
        filter(None, [written(before, ascii_=ascii_), f'"choices":{STOP}', written(behind, ascii_=ascii_)])
    )
    data = f"{{{joined}}}".encode("utf-8", "surrogatepass")
    # As another answer would have shown it, with the usual envelope.
    tail = data[data.index(b'"choices":') :]
    earlier = b'{"id":"e","model":"earlier",' + tail
    for shown in (earlier, data):
        try:
            noted(shapes, shown)
        except MalformedChunk:
            continue
    known = shapes.recognise(data)
    if known is None:
        return
    template, envelope = known
    meaning = shapes.meaning_of(data[envelope:])
    if meaning is not None:
        assert meaning._replace(model=template.model) == decode_chunk(data)
    token = data[:envelope] + f'"choices":{TOKEN}}}'.encode() % b"Hi"
    assert template.text_of(token) == b"Hi"
    assert decode_chunk(token) == Chunk((Delta(DeltaKind.CONTENT, "Hi"),), model=template.model)
