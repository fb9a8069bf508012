"""OpenAI's language towards clients: what is read of a request and what goes on as it came; an answer, and its end."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import (
    AnswerTooLarge,
    InternalError,
    Interrupted,
    InvalidRequest,
    ModelNotFound,
    OriginNotAllowed,
    RateLimited,
    RelayError,
    ShuttingDown,
    StreamTimeout,
    UpstreamIncomplete,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
)
from server.wire.chunks import Answerer, Chunk, Delta, DeltaKind, Usage
from server.wire.completion import (
    CompletionEncoder,
    CompletionRequest,
    decode_completion_request,
    describe_model,
    encode_models,
    encode_openai_error,
)
from server.wire.events import Summary

MAX_TOKENS = 800

MESSAGES = b'[{"role":"user","content":"hi"}]'


def decode(body: bytes) -> CompletionRequest:
    return decode_completion_request(body, max_tokens=MAX_TOKENS)


def asked(fields: bytes = b"") -> CompletionRequest:
    """What is understood of a request that has these fields beside its messages."""
    return decode(b'{"messages":%b%b}' % (MESSAGES, b"," + fields if fields else b""))


def refused(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        decode(body)
    assert (refusal.value.code, refusal.value.status) == ("invalid_request", 400)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400
    return refusal.value


def refused_fields(fields: bytes) -> InvalidRequest:
    return refused(b'{"messages":%b,%b}' % (MESSAGES, fields))


# ---- What goes on as it came

VALUES = [
    b"null", b"true", b'"x"', b'""', b"7", b"-0", b"1.0", b"1E5", b"1e400", b"-1.50e-0007",
    b"12345678901234567890123456789012345678901234567890", b"0.1000000000000000055511151231257827",
    b"[]", b"{}", b"[ 1 ,\n2 ]", b'{ "b" : 1 , "a" : [ { } ] }', b'{"a":1,"a":2}',
    b'"\\u00e9\\/\\n\\ud83c\\udf88"', '"é中😀\u2028"'.encode(), b'"\x7f"',
    b'[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"n":{"maximum":1.0}}}}}]',
    b'[{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]',
    b"[" * 500 + b"]" * 500,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("name", ["tools", "response_format", "x-unknown", "temperature", "seed", "stop"])
def test_a_field_goes_on_byte_for_byte(name: str, value: bytes) -> None:
    """Section 5: the body passes through; what is in it is between the client and the model."""
    sent = asked(b'"%b": %b' % (name.encode(), value)).encode("m")
    assert b'"%b":%b' % (name.encode(), value) in sent


MESSAGE_VALUES = [
    b'[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://a.example/b.png"}}]}]',
    b'[ {"role" : "tool", "tool_call_id":"c", "content":"1.0"} ]',
    b'[{"role":"developer","content":null,"x":1e400,"y":123456789012345678901234567890}]',
    b"[0]",
    b'["anything"]',
    b"[" + b"[" * 400 + b"]" * 400 + b"]",
]


@pytest.mark.parametrize("messages", MESSAGE_VALUES, ids=lambda value: ascii(value)[:30])
def test_messages_go_on_byte_for_byte(messages: bytes) -> None:
    """Section 5: images, tools and roles of any kind."""
    assert b'"messages":%b' % messages in decode(b'{"messages":%b}' % messages).encode("m")


HALVES = [
    (rb'"\ud83d"', rb'"\ufffd"'),
    (rb'"a\uDE00b"', rb'"a\ufffdb"'),
    (rb'"\ud83d\ud83d\ude00\ude00"', rb'"\ufffd\ud83d\ude00\ufffd"'),
    (rb'"\ud83d\n\ude00"', rb'"\ufffd\n\ufffd"'),
    (rb'"\\ud83d \\\ud83d"', rb'"\\ud83d \\\ufffd"'),
    (rb'{"\ud83d":1}', rb'{"\ufffd":1}'),
]


@pytest.mark.parametrize(("sent", "passed"), HALVES)
def test_half_a_character_becomes_a_replacement_character(sent: bytes, passed: bytes) -> None:
    """A page that cuts a text inside an emoji sends one; neither we nor the endpoint could read it as JSON."""
    assert b'"messages":[%b],' % passed in decode(b'{"messages":[%b],"x":1}' % sent).encode("m")


def test_the_order_of_the_fields_stays() -> None:
    sent = decode(b'{"z":1,"model":"a","messages":%b,"max_tokens":5,"a":2}' % MESSAGES).encode("m")
    assert sent == b'{"z":1,"model":"m","messages":%b,"max_tokens":5,"a":2}' % MESSAGES


@pytest.mark.parametrize(
    "given_as", [b"", b'"model":"a"', b'"model":null', b'"mod\\u0065l":"a"', b'"model":"a","model":"b"']
)
def test_the_model_is_the_one_that_the_endpoint_has(given_as: bytes) -> None:
    """Section 5: a fallback is asked for its own model; it stands there once, however it was named."""
    sent = asked(given_as).encode('a "model"\u2028')
    assert json.loads(sent)["model"] == 'a "model"\u2028'
    assert sent.count(b'"model":') == 1


@pytest.mark.parametrize(
    ("fields", "model"), [(b"", None), (b'"model":null', None), (b'"model":"a"', "a"), (b'"model":""', "")]
)
def test_the_model_that_was_asked_for_is_known(fields: bytes, model: str | None) -> None:
    """Section 5: the allow-list looks at it."""
    assert asked(fields).model == model


def test_a_request_can_be_encoded_for_one_endpoint_after_the_other() -> None:
    request = asked(b'"model":"a"')
    assert [json.loads(request.encode(model))["model"] for model in ("a", "b", "a")] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("fields", "streamed"),
    [(b"", False), (b'"stream":null', False), (b'"stream":false', False), (b'"stream":true', True)],
)
def test_an_answer_is_streamed_if_that_is_asked(fields: bytes, streamed: bool) -> None:
    request = asked(fields)
    assert (request.streamed, request.verbatim) == (streamed, True)


def test_a_name_that_is_given_twice_goes_on_once() -> None:
    """Else the endpoint might read the one that we did not (RFC 8259 §4)."""
    sent = asked(b'"max_tokens":5,"n":2,"x":1,"max_tokens":1000000,"n":1,"x":2').encode("m")
    assert sent == b'{"messages":%b,"max_tokens":800,"n":1,"x":2,"model":"m"}' % MESSAGES


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (b'[1,{"role":"user", "content":"hi \xc3\xa9"}]', '{"role":"user", "content":"hi é"}'),
        (b'["x"]', '"x"'),
    ],
)
def test_the_prompt_is_the_last_message_as_it_came(messages: bytes, prompt: str) -> None:
    """SLUICE_LOG_PROMPTS."""
    assert decode(b'{"messages":%b}' % messages).prompt == prompt


# ---- The bound of tokens

BOUNDS = [
    # what was asked, what goes on, what it may cost
    (b"", {"max_tokens": 800}, 800),
    (b'"max_tokens":5', {"max_tokens": 5}, 5),
    (b'"max_tokens":800', {"max_tokens": 800}, 800),
    (b'"max_tokens":801', {"max_tokens": 800}, 800),
    (b'"max_tokens":100000000000000000000000000', {"max_tokens": 800}, 800),
    (b'"max_tokens":null', {"max_tokens": 800}, 800),
    (b'"max_completion_tokens":5', {"max_completion_tokens": 5}, 5),
    (b'"max_completion_tokens":801', {"max_completion_tokens": 800}, 800),
    (b'"max_completion_tokens":null', {"max_completion_tokens": None, "max_tokens": 800}, 800),
    (b'"max_tokens":null,"max_completion_tokens":5', {"max_tokens": None, "max_completion_tokens": 5}, 5),
    (b'"max_tokens":5,"max_completion_tokens":900', {"max_tokens": 5, "max_completion_tokens": 800}, 800),
    (b'"max_tokens":900,"max_completion_tokens":5', {"max_tokens": 800, "max_completion_tokens": 5}, 800),
    (b'"max_tokens":5,"max_completion_tokens":6', {"max_tokens": 5, "max_completion_tokens": 6}, 6),
    (b'"max_tokens": 5 ', {"max_tokens": 5}, 5),
    (b'"max\\u005ftokens":900', {"max_tokens": 800}, 800),
]


@pytest.mark.parametrize(("fields", "sent", "cost"), BOUNDS)
def test_no_request_may_cost_more_than_the_bound(fields: bytes, sent: dict[str, Any], cost: int) -> None:
    """Section 5: max_tokens and max_completion_tokens clamped to the bound, set where absent."""
    request = asked(fields)
    body = json.loads(request.encode("m"))
    assert {name: body[name] for name in body if name.startswith("max_")} == sent
    assert request.max_tokens == cost


@pytest.mark.parametrize("name", [b"max_tokens", b"max_completion_tokens"])
@pytest.mark.parametrize(
    "value", [b"0", b"-1", b"-0", b"true", b"false", b'"5"', b"5.5", b"5.0", b"5e0", b"[]", b"{}", b"[5]"]
)
def test_what_is_no_number_of_tokens_is_refused(name: bytes, value: bytes) -> None:
    """Passed on, it might mean no bound at all to the endpoint."""
    error = refused_fields(b'"%b":%b' % (name, value))
    assert error.param == name.decode()
    assert name.decode() in str(error)


CONTINUED = [
    (b"", {"max_tokens": 790}, 790),
    (b'"max_tokens":30', {"max_tokens": 20}, 20),
    (b'"max_completion_tokens":30', {"max_completion_tokens": 20}, 20),
    (b'"max_tokens":null,"max_completion_tokens":30', {"max_tokens": None, "max_completion_tokens": 20}, 20),
    (b'"max_tokens":30,"max_completion_tokens":40', {"max_tokens": 20, "max_completion_tokens": 30}, 30),
    (b'"max_tokens":10', {"max_tokens": 1}, 1),
    (b'"max_tokens":3', {"max_tokens": 1}, 1),
]


@pytest.mark.parametrize(("fields", "sent", "cost"), CONTINUED)
def test_what_is_left_of_the_bound_is_for_who_goes_on(fields: bytes, sent: dict[str, Any], cost: int) -> None:
    """SLUICE_RESCUE: both parts of an answer cost no more than one; no bound is added to those that were set."""
    request = asked(fields).continued("so far", 10)
    body = json.loads(request.encode("m"))
    assert {name: body[name] for name in body if name.startswith("max_")} == sent
    assert request.max_tokens == cost


def test_who_goes_on_is_told_the_answer_so_far_and_else_the_same() -> None:
    """SLUICE_RESCUE: the messages that came are still the very bytes."""
    before = decode(b'{"x":1e400,"messages":[ {"role" : "user"} ],"stream":true,"model":"a"}')
    after = before.continued('so "far" \u2028', 1)
    assert (
        after.encode("m")
        == (
            '{"x":1e400,"messages":[{"role" : "user"},{"role":"assistant","content":"so \\"far\\" \u2028"}],'
            '"stream":true,"model":"m","max_tokens":799}'
        ).encode()
    )
    assert (after.model, after.streamed) == ("a", True)
    assert b"assistant" not in before.encode("m"), "it may be asked as it was as well"


# ---- What is refused


@pytest.mark.parametrize("value", [b"1", b"null"])
def test_one_completion_may_be_asked_for_by_name(value: bytes) -> None:
    assert b'"n":' + value in asked(b'"n":%b' % value).encode("m")


@pytest.mark.parametrize(
    "value", [b"2", b"128", b"0", b"-1", b"1.5", b"true", b'"1"', b"[]", b"99999999999999999999999"]
)
def test_more_than_one_completion_is_refused(value: bytes) -> None:
    """Section 5: n > 1 refused with 400; it would multiply the cost behind the bound's back."""
    assert refused_fields(b'"n":%b' % value).param == "n"


@pytest.mark.parametrize(
    "body", [b"{}", *[b'{"messages":%b}' % value for value in (b"[]", b"null", b'"hi"', b"{}", b"7")]]
)
def test_a_request_without_messages_is_refused(body: bytes) -> None:
    assert refused(body).param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [(b'"model":7', "model"), (b'"model":["a"]', "model"), (b'"stream":1', "stream"), (b'"stream":"true"', "stream")],
)
def test_what_decides_over_the_answers_form_has_its_type(fields: bytes, param: str) -> None:
    error = refused_fields(fields)
    assert error.param == param
    assert param in str(error)


NO_JSON = [
    b"", b" ", b"hi", b"[]", b'"x"', b"7", b"null", b"{", b'{"messages":', b"{'messages':[]}",
    b'{"messages":%b,}' % MESSAGES, b'{"messages":%b}x' % MESSAGES, b'{"messages":%b}{}' % MESSAGES,
    b'\xef\xbb\xbf{"messages":%b}' % MESSAGES, b'{"messages":["\xff"]}', b'{"messages":["\xed\xa0\x80"]}',
    b'{"\xff":1,"messages":%b}' % MESSAGES, b'{"messages":["\x01"]}', b'{"messages":["\\x"]}',
    b'{"messages":[01]}', b'{"messages":[1.]}', b'{"messages":[tru]}',
    '{"messages":["é"]}'.encode("latin-1"), '{"messages":["x"]}'.encode("utf-16"),
]  # fmt: skip


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: ascii(body)[:40])
def test_what_is_no_json_object_in_utf_8_is_refused(body: bytes) -> None:
    """Here, and in our words; what the endpoint makes of it nobody knows."""
    refused(body)


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity"])
@pytest.mark.parametrize("where", [b'"temperature":%b', b'"x":[%b]', b'"max_tokens":%b'])
def test_what_json_has_no_word_for_is_refused(where: bytes, value: bytes) -> None:
    """Python writes it, and who sent it is helped by its name."""
    said = str(refused_fields(where % value))
    if b"[" not in where:
        assert where.partition(b":")[0].strip(b'"').decode() in said


COSTLY = {
    "nested arrays": b'{"messages":' + b"[" * (1 << 20),
    "nested arrays that end": b'{"messages":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "nested in another field": b'{"messages":%b,"x":' % MESSAGES + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "nested objects": b'{"a":' * 200_000,
    "a long name": b'{"%b":1}' % (b"x" * (1 << 20)),
    "names one by one": b"{" + b",".join(b'"%d":1' % number for number in range(90_000)) + b"}",
    "a name a hundred thousand times": b"{" + b'"n":1,' * 150_000 + b'"messages":[]}',
    "many digits": b'{"messages":%b,"max_tokens":%b}' % (MESSAGES, b"-" + b"9" * (1 << 20)),
    "a long text for a number": b'{"messages":%b,"max_tokens":"%b"}' % (MESSAGES, b"9" * (1 << 20)),
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY.keys())
def test_a_refusal_is_quick_whatever_the_body(body: bytes) -> None:
    """Row A16: the loop that reads it also relays everybody else's tokens. 50 ms, with room for a slow machine."""
    took = []
    for _ in range(3):
        began_at = time.thread_time()
        refused(body)
        took.append(time.thread_time() - began_at)
    assert min(took) < 0.15


@pytest.mark.parametrize("content", ["x" * 20, "中" * 5, '"\n' * 6, "😀" * 2], ids=ascii)
def test_a_large_request_is_read_quickly(content: str) -> None:
    """A megabyte of conversation, as every turn of a long chat sends it, escaped or not."""
    body = json.dumps({"messages": [{"role": "user", "content": content}] * 16_000}).encode()
    took = []
    for _ in range(3):
        began_at = time.thread_time()
        decode(body).encode("m")
        took.append(time.thread_time() - began_at)
    assert min(took) < 0.15


# ---- Any bytes at all

NAMES = st.sampled_from(["messages", "model", "max_tokens", "max_completion_tokens", "n", "stream", "x", ""]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=3
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([1, 5, 900, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(NAMES, ANY, max_size=6).map(lambda body: {"messages": ["hi"]} | body)


def read_or_refused(body: bytes) -> None:
    """Whatever goes on has one model, a bound, one completion, and else the values that came."""
    try:
        request = decode(body)
    except InvalidRequest:
        refused(body)
        return
    before, after = json.loads(body), json.loads(request.encode("m"))
    bounds = [after[name] for name in ("max_tokens", "max_completion_tokens") if after.get(name) is not None]
    assert bounds
    assert all(type(bound) is int and 1 <= bound <= MAX_TOKENS for bound in bounds)
    assert max(bounds) == request.max_tokens
    assert after["model"] == "m"
    assert after.get("n") in (None, 1)
    assert after.get("n") is not True
    replaced = {"model", "max_tokens", "max_completion_tokens"}
    assert json.dumps({name: value for name, value in after.items() if name not in replaced}) == json.dumps(
        {name: value for name, value in before.items() if name not in replaced}
    )


@given(BODIES, st.booleans())
def test_any_json_is_passed_on_bounded_or_refused(body: dict[str, Any], ascii_only: bool) -> None:
    """NaN, lone surrogates and integers of any size among it, as json.dumps writes them."""
    read_or_refused(json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_refused_or_passed_on(body: bytes) -> None:
    """Never another exception: it would be a 500."""
    read_or_refused(body)


# ---- An answer

ENDED = Summary(finish_reason="stop", usage=Usage(1, 2), tokens=2, model="m", ttft_ms=3, duration_ms=5)
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
TOKEN = Chunk((Delta(DeltaKind.CONTENT, "x"),), wire=EVENT)


def answering(*, streamed: bool = True) -> CompletionEncoder:
    """The encoder of an answer of which somebody has begun to speak."""
    encoder = CompletionEncoder(streamed=streamed)
    assert encoder.start(0, "m") == (), "nothing is sent before somebody answers"
    encoder.begin(Answerer("m", "req-1"))
    return encoder


def test_chunks_are_passed_on_as_they_came() -> None:
    """Section 5: byte for byte; nothing but ``data:`` blocks."""
    encoder = answering()
    assert [*encoder.chunk(0, TOKEN)] == [EVENT]
    assert [*encoder.tokens(0, [b"x", b"x"], EVENT + EVENT)] == [EVENT + EVENT]


def test_a_chunk_that_brought_no_bytes_brings_none() -> None:
    assert [*answering().chunk(0, Chunk(finish_reason="stop"))] == []


def test_a_streamed_answer_ends_with_done() -> None:
    assert [*answering().complete(0, ENDED)] == [b"data: [DONE]\n\n"]


def test_an_answer_that_is_not_streamed_is_its_json_alone() -> None:
    encoder = answering(streamed=False)
    assert [*encoder.chunk(0, Chunk(wire=b'{"choices":[]}'))] == [b'{"choices":[]}']
    assert [*encoder.complete(0, ENDED)] == []


def test_who_answers_is_known() -> None:
    """Section 5: x-request-id passes through."""
    assert answering().answerer == Answerer("m", "req-1")
    assert CompletionEncoder(streamed=True).answerer is None


@pytest.mark.parametrize("streamed", [True, False])
def test_a_failure_before_the_first_byte_is_none_of_the_answers_bytes(streamed: bool) -> None:
    """Section 5: it still has a status, which somebody else sends."""
    encoder = CompletionEncoder(streamed=streamed)
    error = UpstreamRejected()
    assert [*encoder.failed(0, error)] == []
    assert encoder.error is error


def test_a_failure_behind_the_first_byte_is_one_block_and_no_done() -> None:
    """Section 5: ``data: {"error":{"message","type","param","code"}}``; a cut answer never looks complete."""
    encoder = answering()
    [block] = encoder.failed(0, UpstreamIncomplete())
    assert block.startswith(b"data: ")
    assert block.endswith(b"\n\n")
    assert block.count(b"\n") == 2
    assert json.loads(block[6:]) == {
        "error": {
            "message": "The model's answer was cut before its end.",
            "type": "server_error",
            "param": None,
            "code": "upstream_incomplete",
        }
    }
    assert encoder.error is None


def test_an_answer_that_is_not_streamed_has_a_status_to_its_end() -> None:
    """Its head is not sent before all of it is there."""
    encoder = answering(streamed=False)
    error = StreamTimeout()
    assert [*encoder.failed(0, error)] == []
    assert encoder.error is error


def test_a_stop_looks_like_a_cut_and_not_like_an_end() -> None:
    """OpenAI's language has no word for it."""
    [block] = answering().stopped(0, ENDED)
    assert json.loads(block[6:])["error"]["code"] == "interrupted"
    encoder = CompletionEncoder(streamed=True)
    assert [*encoder.stopped(0, ENDED)] == []
    assert isinstance(encoder.error, Interrupted)


@pytest.mark.parametrize("retry_ms", [None, 1000])
def test_a_heartbeat_is_a_comment_with_one_line_end(retry_ms: int | None) -> None:
    """Section 5: ``: ping`` followed by a blank line breaks openai-python; and no ``retry`` is ever sent."""
    assert answering().ping(retry_ms) == b": ping\n"


# ---- Errors

TYPES = [
    (UpstreamTimeout(), None, "server_error", "upstream_timeout"),
    (UpstreamRateLimited(), None, "rate_limit_error", "upstream_rate_limited"),
    (UpstreamRejected(), None, "server_error", "upstream_rejected"),
    (UpstreamRejected(), 400, "invalid_request_error", "upstream_rejected"),
    (UpstreamRejected(), 422, "invalid_request_error", "upstream_rejected"),
    (UpstreamRejected(), 401, "authentication_error", "upstream_rejected"),
    (AnswerTooLarge(), None, "server_error", "answer_too_large"),
    (Interrupted(), None, "server_error", "interrupted"),
    (InternalError(), None, "server_error", "internal_error"),
    (RateLimited(retry_after=3), None, "rate_limit_error", "rate_limit_exceeded"),
    (ShuttingDown(), None, "server_error", "shutting_down"),
    (OriginNotAllowed(), None, "permission_error", "origin_not_allowed"),
    (ModelNotFound(["a", "b"]), None, "invalid_request_error", "model_not_found"),
    (InvalidRequest("invalid_request", "No."), None, "invalid_request_error", "invalid_request"),
]


@pytest.mark.parametrize(("error", "status", "type_", "code"), TYPES, ids=lambda value: str(value)[:20])
def test_an_error_of_ours_has_openais_shape(error: RelayError, status: int | None, type_: str, code: str) -> None:
    """Section 5: refusals of ours have OpenAI's error shape; the type is the one of that status."""
    assert json.loads(encode_openai_error(error, status=status)) == {
        "error": {"message": str(error), "type": type_, "param": None, "code": code}
    }


def test_the_field_at_fault_is_its_param() -> None:
    error = InvalidRequest("invalid_request", "No.", param="max_tokens")
    assert json.loads(encode_openai_error(error))["error"]["param"] == "max_tokens"


# ---- Models


def test_models_are_listed_as_openai_lists_them() -> None:
    """Section 5: GET /v1/models; SDKs read ``object``, ``data`` and the four fields of each."""
    assert json.loads(encode_models(["a", "b/c"])) == {
        "object": "list",
        "data": [
            {"id": "a", "object": "model", "created": 0, "owned_by": "sluice"},
            {"id": "b/c", "object": "model", "created": 0, "owned_by": "sluice"},
        ],
    }
    assert describe_model("a")["id"] == "a"
