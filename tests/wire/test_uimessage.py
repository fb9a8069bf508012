"""The AI SDK's chat: conversations out of its messages, and an answer as the parts of one message."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest, UpstreamTimeout
from server.wire.chat import MAX_MESSAGES, Content
from server.wire.chunks import Chunk, Delta, DeltaKind, Usage
from server.wire.events import Summary
from server.wire.sse import EventStreamParser
from server.wire.uimessage import UIMessageEncoder, decode_ui_chat

MAX_CHARS = 100

PICTURE = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AAAA"}


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def message(role: str, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "m-1", "role": role, "parts": list(parts), **fields}


def body(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"id": "chat-1", "messages": list(messages), "trigger": "submit-message"} | fields).encode()


def conversation(*messages: Any) -> list[tuple[str, Content]]:
    return list(decode_ui_chat(body(*messages)).conversation(max_chars=MAX_CHARS))


def refused(posted: bytes) -> str:
    """The words in which it is refused."""

    def read() -> None:
        decode_ui_chat(posted).conversation(max_chars=MAX_CHARS)

    with pytest.raises(InvalidRequest) as refusal:
        read()
    assert refusal.value.code == "invalid_request"
    said = str(refusal.value)
    assert said.isprintable()
    assert len(said) < 400
    return said


# ---- Conversations


def test_a_conversation_is_its_messages_texts() -> None:
    """Section 6: ``{"id","messages":[UIMessage…],"trigger","messageId"?}``."""
    assert conversation(
        message("system", text("be brief")), message("user", text("hi")), message("assistant", text("hello")),
        message("user", text("why? \u2028 😀")),
    ) == [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "why? \u2028 😀")]  # fmt: skip


def test_the_chats_id_is_read() -> None:
    assert decode_ui_chat(body(message("user", text("hi")), id="é" * 200)).id == "é" * 200


def test_a_message_of_several_texts_is_one_turn() -> None:
    """Reasoning between them begins a new part; to the model it was one answer."""
    parts = [text("a"), {"type": "reasoning", "text": "hm", "state": "done"}, {"type": "step-start"}, text("b")]
    again = message("user", text("c"), text("d"))
    turns = conversation(message("user", text("q")), message("assistant", *parts), again)
    assert turns == [("user", "q"), ("assistant", "ab"), ("user", "cd")]


OTHER_PARTS: list[dict[str, Any]] = [
    {"type": "reasoning", "text": "hm", "providerMetadata": {"x": {"signature": "…"}}},
    {"type": "step-start"},
    {"type": "source-url", "sourceId": "s", "url": "https://a.example", "title": "A"},
    {"type": "source-document", "sourceId": "s", "mediaType": "application/pdf", "title": "A"},
    {"type": "tool-weather", "toolCallId": "t", "state": "output-available", "input": {"a": 1}, "output": [1.5]},
    {"type": "dynamic-tool", "toolName": "f", "toolCallId": "t", "state": "input-streaming"},
    {"type": "data-chart", "id": "c", "data": {"nested": [1, {"a": None}]}},
    {"type": "something-of-tomorrow", "x": 1e300},
]


@pytest.mark.parametrize("part", OTHER_PARTS, ids=lambda part: part["type"])
def test_parts_that_are_not_for_the_model_are_passed_over(part: dict[str, Any]) -> None:
    """``ai`` 5, 6 and 7 send back all that the message holds on the page."""
    assert conversation(message("user", text("q"), part), message("assistant", part, text("a"))) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize("parts", [[], [text("")], [OTHER_PARTS[0]], [{"type": "step-start"}, text("")]])
def test_an_answer_of_ours_without_a_word_is_no_turn(parts: list[dict[str, Any]]) -> None:
    """It failed, or was stopped; the page keeps the message, and endpoints refuse an empty one."""
    turns = conversation(message("user", text("q")), message("assistant", *parts), message("user", text("again")))
    assert turns == [("user", "q"), ("user", "again")]


def test_an_app_may_add_fields_of_its_own() -> None:
    """``useChat`` sends what ``prepareSendMessagesRequest`` and ``body`` add; messages carry metadata."""
    posted = body(
        message("user", text("hi", state="done", x=[1]), metadata={"at": 1.5}, createdAt="2026-01-01"),
        messageId="m-1", trigger="regenerate-message", model="mine", nested={"a": [{}]}, flag=None,
    )  # fmt: skip
    assert decode_ui_chat(posted).conversation(max_chars=MAX_CHARS) == (("user", "hi"),)


# ---- Files


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "data:image/webp,x", "https://a.example/b.png?c=d"])
def test_an_image_goes_to_the_model_before_the_text(url: str) -> None:
    """As OpenAI's content parts."""
    assert conversation(message("user", text("what is it?"), PICTURE | {"url": url, "filename": "b.png"})) == [
        ("user", [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}])
    ]


def test_several_images_stay_in_their_order_and_need_no_text() -> None:
    urls = ["https://a.example/1", "https://a.example/2"]
    [(role, content)] = conversation(message("user", *(PICTURE | {"url": url} for url in urls)))
    assert role == "user"
    assert content == [{"type": "image_url", "image_url": {"url": url}} for url in urls]


NO_IMAGES = [
    {"mediaType": "application/pdf", "url": "data:application/pdf;base64,AAAA"},
    {"mediaType": "text/plain", "url": "https://a.example/b.txt"},
    {"mediaType": "image/png", "url": "http://a.example/b.png"},
    {"mediaType": "image/png", "url": "file:///etc/passwd"},
    {"mediaType": "image/png", "url": "data:text/html,x"},
    {"mediaType": "image/png", "url": "blob:https://a.example/1"},
    {"mediaType": "image/png", "url": "javascript:x"},
    {"mediaType": "image/png", "url": ""},
    {"mediaType": "image/png"},
    {"url": "data:image/png;base64,AAAA"},
    {"mediaType": "", "url": "https://a.example/b"},
    {},
]


@pytest.mark.parametrize("file", NO_IMAGES, ids=json.dumps)
def test_a_file_that_is_no_image_is_refused(file: dict[str, Any]) -> None:
    """Else the model would answer a question of which it has seen half."""
    said = refused(body(message("user", text("q")), message("user", text("this"), {"type": "file"} | file)))
    assert "messages[1]" in said


def test_an_image_of_the_assistants_is_not_sent_back() -> None:
    """Endpoints take images from users alone."""
    assert conversation(message("user", text("q")), message("assistant", text("a"), PICTURE)) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


# ---- Bounds


@pytest.mark.parametrize("character", ["a", "é", "中", "😀"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_message_is_bounded_in_code_points(role: str, character: str) -> None:
    """SLUICE_MAX_QUERY_CHARS: all parts of it together."""
    half = character * (MAX_CHARS // 2)
    turns = conversation(message(role, text(half), text(half)))
    assert turns == [(role, character * MAX_CHARS)]
    said = refused(body(message("user", text("q")), message(role, text(half), text(half + "a"))))
    assert "messages[1]" in said


def test_an_answer_of_ours_may_be_longer() -> None:
    """It was as long as the server let it be; refused, it would lock its chat for ever."""
    long = "a" * (MAX_CHARS * 10)
    turns = conversation(message("user", text("q")), message("assistant", text(long)), message("user", text("go on")))
    assert turns[1] == ("assistant", long)


def test_half_a_character_becomes_a_replacement_character() -> None:
    """A page that cuts a text inside an emoji sends one."""
    assert conversation(message("user", text("a\ud83d"))) == [("user", "a\ufffd")]
    assert conversation(message("user", text("a\ud83d\ude00"))) == [("user", "a😀")]


@pytest.mark.parametrize("value", ["", " ", "\n\t\u3000"])
def test_a_question_must_say_something(value: str) -> None:
    assert "messages[0]" in refused(body(message("user", text(value))))
    assert "messages[0]" in refused(body(message("user")))


def test_what_is_not_a_question_may_be_blank() -> None:
    assert conversation(message("system", text("")), message("user", text("q")))[0] == ("system", "")


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_nul_is_refused(role: str) -> None:
    assert "NUL" in refused(body(message("user", text("q")), message(role, text("a\0b"))))


@pytest.mark.parametrize("count", [1, MAX_MESSAGES, MAX_MESSAGES + 1])
def test_a_chat_is_bounded_in_messages(count: int) -> None:
    posted = body(*[message("user", text("q"))] * count)
    if count > MAX_MESSAGES:
        assert "messages" in refused(posted)
    else:
        assert len(decode_ui_chat(posted).conversation(max_chars=MAX_CHARS)) == count


@pytest.mark.parametrize("parts", [[], OTHER_PARTS])
def test_a_chat_in_which_nobody_says_anything_is_refused(parts: list[dict[str, Any]]) -> None:
    refused(body(message("assistant", *parts), message("assistant", *parts)))


WRONG = {
    "no messages": (body(), "messages"),
    "messages of another type": (body(messages={}), "messages"),
    "messages that are null": (body(messages=None), "messages"),
    "no id": (json.dumps({"messages": [message("user", text("q"))]}).encode(), "id"),
    "an empty id": (body(message("user", text("q")), id=""), "id"),
    "a long id": (body(message("user", text("q")), id="x" * 201), "id"),
    "an id of another type": (body(message("user", text("q")), id=7), "id"),
    "a role unknown": (body(message("tool", text("q"))), "role"),
    "a role of another type": (body({"role": 7, "parts": []}), "role"),
    "no role": (body({"parts": [text("q")]}), "role"),
    "no parts": (body({"role": "user", "content": "q"}), "parts"),
    "parts of another type": (body({"role": "user", "parts": "q"}), "parts"),
    "a part of another type": (body({"role": "user", "parts": ["q"]}), "parts"),
    "a part without a type": (body(message("user", {"text": "q"})), "type"),
    "a text of another type": (body(message("user", {"type": "text", "text": 7})), "text"),
}


@pytest.mark.parametrize(("posted", "named"), WRONG.values(), ids=WRONG.keys())
def test_what_has_another_shape_is_refused_and_named(posted: bytes, named: str) -> None:
    assert named in refused(posted)


@pytest.mark.parametrize(
    "posted", [b"", b"[]", b"null", b'"x"', b"{", b"\xff", b"{'id':1}", b'{"id":"a","messages":[NaN]}']
)
def test_what_is_no_json_object_is_refused(posted: bytes) -> None:
    refused(posted)


COSTLY = {
    "nested arrays": b'{"id":"a","messages":' + b"[" * (1 << 20),
    "nested in a field of the app's": b'{"id":"a","x":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "many parts": body(message("user", *[text("\0")] * 30_000)),
    "many files": body(message("user", *[{"type": "file"}] * 30_000)),
    "a long text": body(message("user", text("x" * 1_000_000))),
    "a long role": body(message("x" * 1_000_000)),
    "many empty answers": body(*[message("assistant")] * MAX_MESSAGES),
}


@pytest.mark.parametrize("posted", COSTLY.values(), ids=COSTLY.keys())
def test_a_refusal_is_quick_whatever_the_body(posted: bytes) -> None:
    """Row A16: the loop that reads it also relays everybody else's tokens. 50 ms, with room for a slow machine."""
    took = []
    for _ in range(3):
        began_at = time.thread_time()
        refused(posted)
        took.append(time.thread_time() - began_at)
    assert min(took) < 0.15


NAMES = st.sampled_from(["id", "messages", "role", "parts", "type", "text", "url", "mediaType", "x"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["user", "assistant", "system", "text", "file", "image/png", "https://a.example"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "text", "file", "reasoning"]) | ANY},
    optional={"text": st.text(max_size=120) | ANY, "url": ANY, "mediaType": ANY, "x": ANY},
)
CHATS = st.fixed_dictionaries(
    {
        "id": st.just("a") | ANY,
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "system"]) | ANY, "parts": st.lists(PARTS, max_size=3)}
            ),
            max_size=4,
        )
        | ANY,
    },
    optional={"x": ANY},
)


@given(CHATS | ANY)
def test_any_json_is_a_conversation_or_refused(value: Any) -> None:
    """Never another exception: it would be a 500."""
    posted = json.dumps(value).encode()
    try:
        turns = decode_ui_chat(posted).conversation(max_chars=MAX_CHARS)
    except InvalidRequest:
        refused(posted)
        return
    assert turns
    assert all(role in {"user", "assistant", "system"} for role, _ in turns)
    assert all(content for role, content in turns if role != "system")


@given(st.binary())
def test_any_bytes_are_a_conversation_or_refused(posted: bytes) -> None:
    refused(posted)


# ---- An answer

ENDED = Summary(finish_reason="stop", usage=Usage(1, 2), tokens=2, model="m", ttft_ms=3, duration_ms=5)
CONTENT, REASONING, OTHER = DeltaKind.CONTENT, DeltaKind.REASONING, DeltaKind.OTHER


def parts_of(*events: Sequence[bytes]) -> list[Any]:
    """What a client reads: the JSON of each part, and ``[DONE]`` as it is."""
    read = EventStreamParser().feed(b"".join(event for batch in events for event in batch))
    assert all((event.type, event.last_event_id) == (b"message", b"") for event in read), "data, and nothing else"
    return [event.data.decode() if event.data == b"[DONE]" else json.loads(event.data) for event in read]


def chunk(*deltas: tuple[DeltaKind, str]) -> Chunk:
    return Chunk(tuple(Delta(kind, said) for kind, said in deltas))


def test_an_answer_is_the_parts_of_one_message_in_their_order() -> None:
    """Section 6: start, start-step, text-start, -delta, -end, finish-step, finish, [DONE]; the minimal keys of each."""
    encoder = UIMessageEncoder("msg-1")
    assert parts_of(
        encoder.start(0, "m"),
        encoder.chunk(2, chunk((CONTENT, "Hel"))),
        encoder.chunk(4, chunk((CONTENT, "lo"))),
        encoder.complete(5, ENDED),
    ) == [
        {"type": "start", "messageId": "msg-1"},
        {"type": "start-step"},
        {"type": "text-start", "id": "1"},
        {"type": "text-delta", "id": "1", "delta": "Hel"},
        {"type": "text-delta", "id": "1", "delta": "lo"},
        {"type": "text-end", "id": "1"},
        {"type": "finish-step"},
        {"type": "finish"},
        "[DONE]",
    ]


def test_each_part_is_an_event_of_its_own() -> None:
    """The log counts them, and a replay begins at one."""
    encoder = UIMessageEncoder("msg-1")
    events = [
        *encoder.start(0, "m"),
        *encoder.chunk(2, chunk((REASONING, "hm"), (CONTENT, "a"))),
        *encoder.complete(6, ENDED),
    ]
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in events)
    assert all(event.count(b"\n") == 2 for event in events)


def test_text_and_reasoning_take_turns_each_a_part_of_its_own() -> None:
    """Section 6: reasoning-*; one part is open at a time, and no id comes twice."""
    encoder = UIMessageEncoder("msg-1")
    parts = parts_of(
        encoder.chunk(0, chunk((REASONING, "a"))),
        encoder.chunk(0, chunk((REASONING, "b"), (CONTENT, "c"))),
        encoder.tokens(0, [b"d"], b""),
        encoder.chunk(0, chunk((REASONING, "e"))),
        encoder.tokens(0, [b"f"], b""),
        encoder.complete(0, ENDED),
    )
    assert [(part["type"], part.get("id"), part.get("delta")) for part in parts[:-3]] == [
        ("reasoning-start", "1", None), ("reasoning-delta", "1", "a"), ("reasoning-delta", "1", "b"),
        ("reasoning-end", "1", None),
        ("text-start", "2", None), ("text-delta", "2", "c"), ("text-delta", "2", "d"), ("text-end", "2", None),
        ("reasoning-start", "3", None), ("reasoning-delta", "3", "e"), ("reasoning-end", "3", None),
        ("text-start", "4", None), ("text-delta", "4", "f"), ("text-end", "4", None),
    ]  # fmt: skip


def test_the_short_way_of_tokens_says_the_same_as_the_long_one() -> None:
    short, long = UIMessageEncoder("m"), UIMessageEncoder("m")
    texts = ["a", 'q"', "a\nb", "é中😀", "%b %d %%", "\u2028"]
    inside = [json.dumps(said, ensure_ascii=False)[1:-1].encode() for said in texts]
    assert parts_of(short.tokens(0, inside, b"")) == parts_of(
        *(long.chunk(0, chunk((CONTENT, said))) for said in texts)
    )


def test_what_this_language_has_no_part_for_makes_none() -> None:
    """A tool call is the app's own business to run; an empty delta is nothing."""
    encoder = UIMessageEncoder("msg-1")
    assert [*encoder.chunk(0, chunk((OTHER, "")))] == []
    assert [*encoder.chunk(0, Chunk(finish_reason="stop", usage=Usage(1, 2), model="m"))] == []
    assert parts_of(encoder.complete(0, ENDED)) == [{"type": "finish-step"}, {"type": "finish"}, "[DONE]"]


@pytest.mark.parametrize("open_part", [True, False])
def test_a_stop_is_an_abort_and_an_end(open_part: bool) -> None:
    """Section 6: a stop is an abort part."""
    encoder = UIMessageEncoder("msg-1")
    if open_part:
        encoder.chunk(0, chunk((CONTENT, "a")))
    assert parts_of(encoder.stopped(0, ENDED)) == [
        *([{"type": "text-end", "id": "1"}] if open_part else []),
        {"type": "abort"},
        "[DONE]",
    ]


@pytest.mark.parametrize("open_part", [True, False])
def test_a_failure_is_an_error_and_no_done(open_part: bool) -> None:
    """Section 6: any failure is an error part, in our words; a cut answer never looks complete."""
    encoder = UIMessageEncoder("msg-1")
    if open_part:
        encoder.chunk(0, chunk((REASONING, "a")))
    assert parts_of(encoder.failed(0, UpstreamTimeout())) == [
        {"type": "error", "errorText": "The model took too long to answer."}
    ]


@pytest.mark.parametrize("retry_ms", [None, 1000])
def test_a_heartbeat_is_a_comment(retry_ms: int | None) -> None:
    """The SDK's parser hands every event on as a part; a comment it passes over."""
    ping = UIMessageEncoder("msg-1").ping(retry_ms)
    assert ping.startswith(b":")
    assert parts_of([ping, *UIMessageEncoder("m").start(0, "m")])[0]["type"] == "start"


@pytest.mark.parametrize("message_id", ["msg-1", 'a"b', "é\n", "\\"])
def test_the_message_has_the_id_that_was_given(message_id: str) -> None:
    """Section 6: a stable messageId."""
    assert parts_of(UIMessageEncoder(message_id).start(0, "m"))[0]["messageId"] == message_id


@given(st.lists(st.tuples(st.sampled_from([CONTENT, REASONING, OTHER]), st.text(st.characters(exclude_categories=[])))))
def test_any_answer_says_exactly_its_texts_in_parts_that_open_and_close(deltas: list[tuple[DeltaKind, str]]) -> None:
    """Half surrogate pairs, which stay JSON escapes, among them."""
    encoder = UIMessageEncoder("msg-1")
    parts = parts_of(*(encoder.chunk(0, chunk(delta)) for delta in deltas), encoder.complete(0, ENDED))
    said, open_id, begun = [], None, 0
    for part in parts[:-3]:
        name, _, move = part["type"].partition("-")
        match move:
            case "start":
                begun += 1
                assert (open_id, part["id"]) == (None, str(begun))
                open_id = part["id"]
            case "delta":
                assert part["id"] == open_id
                said.append((name, part["delta"]))
            case "end":
                assert part["id"] == open_id
                open_id = None
    assert open_id is None
    names = {CONTENT: "text", REASONING: "reasoning"}
    assert said == [(names[kind], words) for kind, words in deltas if kind in names]
