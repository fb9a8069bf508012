"""The template of token events: what fits says exactly what decoding would have said, and all else does not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.wire.chunks import Delta, DeltaKind, decode_chunk
from server.wire.template import TokenTemplate

CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n"])

# Other members of a chunk, with values that a content might have too.
FRAMES = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["c-1", "stop", "0"]),
        "object": st.just("chat.completion.chunk"),
        "created": st.integers(0, 9),
        "model": st.one_of(TEXTS, st.sampled_from(["bench", "assistant"])),
        "system_fingerprint": st.one_of(st.none(), TEXTS),
        "usage": st.none(),
        "x": st.recursive(st.one_of(st.none(), st.booleans(), TEXTS), lambda inner: st.lists(inner, max_size=3)),
    },
)


def data_of(content: Any, *, ensure_ascii: bool = False, delta: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """The data of a token event."""
    choice = {"index": 0, "delta": (delta or {}) | {"content": content}, "finish_reason": None}
    value = {"id": "c-1", "model": "bench", "choices": [choice]} | fields
    return json.dumps(value, ensure_ascii=ensure_ascii).encode()


BEFORE, AFTER = data_of("<here>").split(b"<here>")


def framed(data: bytes, line_end: bytes = b"\n") -> bytes:
    return b"data: " + data + 2 * line_end


def learn(data: bytes, line_end: bytes = b"\n") -> TokenTemplate | None:
    return TokenTemplate.learn(data, decode_chunk(data), framed(data, line_end))


def learnt(data: bytes, line_end: bytes = b"\n") -> TokenTemplate:
    template = learn(data, line_end)
    assert template is not None
    return template


def said(text: bytes) -> str:
    value = json.loads(b'"' + text + b'"')
    assert isinstance(value, str)
    return value


def check(template: TokenTemplate, data: bytes, line_end: bytes) -> None:
    """What fits is one delta of content, and nothing else, to who decodes it."""
    text, texts = template.text_of(data), template.texts_of(framed(data, line_end))
    if template.blank == 2 * line_end:
        assert texts == (None if text is None else [text])
    if text is not None:
        chunk = decode_chunk(data)
        assert chunk.deltas == (Delta(DeltaKind.CONTENT, said(text)),)
        assert (chunk.finish_reason, chunk.usage, chunk.error) == (None, None, None)
        assert chunk.model == template.model


@given(TEXTS, TEXTS, FRAMES, LINE_ENDS, st.booleans(), st.booleans())
@example("stop", "b", {"id": "stop"}, b"\n", False, False)
@example("bench", "b", {"model": "bench"}, b"\n", False, False)
def test_what_fits_says_what_decoding_would_have_said(
    first: str, second: str, frame: dict[str, Any], line_end: bytes, ensure_ascii: bool, after: bool
) -> None:
    """Whatever else the events hold, in whatever order it stands."""
    choice = {"choices": [{"delta": {"content": first}}]}
    value = choice | frame if after else frame | choice
    data = json.dumps(value, ensure_ascii=ensure_ascii).encode()
    template = learn(data, line_end)
    if template is not None:
        check(template, data, line_end)
        value["choices"] = [{"delta": {"content": second}}]
        check(template, json.dumps(value, ensure_ascii=ensure_ascii).encode(), line_end)


PARTS = st.lists(
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b'"', b"\\", b"\\u0041", b"\\n", b'"}', b'","finish_reason":"stop', b"\xc3", b"\xa9", b"x"]),
    ),
    max_size=5,
).map(b"".join)


@given(PARTS)
def test_any_bytes_in_the_place_of_the_text_fit_only_if_they_are_text(middle: bytes) -> None:
    """Quotation marks that end it early, other fields, escapes, half characters."""
    check(learnt(data_of("x")), BEFORE + middle + AFTER, b"\n")


@given(st.integers(0, 120), st.binary(min_size=1, max_size=3))
def test_a_change_anywhere_fits_only_inside_the_text(place: int, other: bytes) -> None:
    data = data_of("hello")
    check(learnt(data), data[:place] + other + data[place + len(other) :], b"\n")


@given(st.lists(TEXTS, min_size=1, max_size=8), LINE_ENDS, st.booleans())
def test_several_events_give_their_texts_in_order(texts: list[str], line_end: bytes, ensure_ascii: bool) -> None:
    """All of them, or None where one of them has to be decoded."""
    events = [data_of(text, ensure_ascii=ensure_ascii) for text in texts]
    template = learnt(data_of("x"), line_end)
    found = template.texts_of(b"".join(framed(event, line_end) for event in events))
    one_by_one = [template.text_of(event) for event in events]
    assert found == (None if None in one_by_one else one_by_one)
    if found is not None:
        assert [said(text) for text in found] == texts


PLAIN = ["Hel", " ", "é中😀", "l\u2028o", "\x7f", "/", "stop", "0"]


@pytest.mark.parametrize("text", PLAIN)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_plain_text_fits(text: str, line_end: bytes) -> None:
    template = learnt(data_of("x"), line_end)
    assert template.text_of(data_of(text)) == text.encode()
    assert template.texts_of(framed(data_of(text), line_end)) == [text.encode()]
    assert template.texts_of(framed(data_of(text), line_end) * 3) == [text.encode()] * 3


UNFIT = {
    "an escape": BEFORE + b"a\\nb" + AFTER,
    "an escaped character": BEFORE + b"\\u00e9" + AFTER,
    "an escaped quotation mark": BEFORE + b'a\\"b' + AFTER,
    "a quotation mark": BEFORE + b'a","reasoning":"b' + AFTER,
    "a control character": BEFORE + b"a\tb" + AFTER,
    "NUL": BEFORE + b"\0" + AFTER,
    "invalid UTF-8": BEFORE + b"a\xff" + AFTER,
    "half a character": BEFORE + b"\xc3" + AFTER,
    "half a surrogate pair": BEFORE + b"\xed\xa0\x80" + AFTER,
    "no text": BEFORE + AFTER,
    "less than the frame": BEFORE[:-1] + AFTER,
    "null": data_of(None),
    "a finish_reason": data_of("x").replace(b'"finish_reason": null', b'"finish_reason": "stop"'),
    "usage": data_of("x", usage={"prompt_tokens": 1, "completion_tokens": 2}),
    "another model": data_of("x", model="other"),
    "reasoning": data_of("x", delta={"reasoning": "hm"}),
    "a role": data_of("x", delta={"role": "assistant"}),
    "obfuscation": data_of("x", obfuscation="aB3"),
    "[DONE]": b"[DONE]",
    "nothing": b"",
}


@pytest.mark.parametrize("data", UNFIT.values(), ids=UNFIT)
def test_what_is_not_plain_does_not_fit(data: bytes) -> None:
    """Nor do the events beside it, when they come together: they are decoded in their order."""
    template, fits = learnt(data_of("x")), framed(data_of("y"))
    assert template.text_of(data) is None
    assert template.texts_of(framed(data)) is None
    assert template.texts_of(fits + framed(data)) is None
    assert template.texts_of(framed(data) + fits) is None
    assert template.texts_of(fits + framed(data) + fits) is None


@pytest.mark.parametrize(
    "between", [b": comment\n", b": comment\n\n", b"event: error\n", b"id: 1\n", b"retry: 5\n\n", b"\n", b" ", b"\r"]
)
@pytest.mark.parametrize("place", range(3))
def test_nothing_may_stand_before_between_or_behind_events(between: bytes, place: int) -> None:
    events = [framed(data_of("a")), framed(data_of("b"))]
    events.insert(place, between)
    assert learnt(data_of("x")).texts_of(b"".join(events)) is None


@pytest.mark.parametrize("cut", range(1, len(framed(data_of("a")))))
def test_an_event_that_is_cut_does_not_fit(cut: int) -> None:
    template, event = learnt(data_of("x")), framed(data_of("a"))
    assert template.texts_of(event[:cut]) is None
    assert template.texts_of(event[cut:]) is None
    assert template.texts_of(event + event[:cut]) is None


@pytest.mark.parametrize("events", [b"", b"\n", b"\n\n", b"\n\n\n\n", b"data: \n\n"])
def test_no_event_is_no_text(events: bytes) -> None:
    assert learnt(data_of("x")).texts_of(events) is None


@pytest.mark.parametrize("learns", [b"\n", b"\r\n"])
def test_events_with_other_line_ends_do_not_fit(learns: bytes) -> None:
    template = learnt(data_of("x"), learns)
    assert template.blank == learns * 2
    (other,) = {b"\n", b"\r\n"} - {learns}
    assert template.texts_of(framed(data_of("y"), other)) is None
    assert template.texts_of(framed(data_of("y"), other) + framed(data_of("y"), learns)) is None


@pytest.mark.parametrize("content", ["bench", "stop", "0", "assistant", "c-1", "content", "choices", "null", "a"])
@pytest.mark.parametrize("behind", [{}, {"x": "stop"}, {"x": ["0", "bench"], "y": "assistant"}])
def test_a_content_that_stands_elsewhere_too_is_learnt_in_its_own_place_or_not_at_all(
    content: str, behind: dict[str, Any]
) -> None:
    """Else another field's value would be passed on as text."""
    template = learn(data_of(content, delta={"role": "assistant"}, **behind))
    if template is not None:
        data = data_of("other", delta={"role": "assistant"}, **behind)
        assert template.text_of(data) == b"other"
        changed = data_of(content, delta={"role": "assistant"}, **behind | {"id": "c-2"})
        assert template.text_of(changed) is None


UNLEARNT = {
    "no content": data_of(None),
    "empty content": data_of(""),
    "an escape": data_of("a\nb"),
    "escaped characters": data_of("é", ensure_ascii=True),
    "content and reasoning": data_of("x", delta={"reasoning": "hm"}),
    "content and a tool call": data_of("x", delta={"tool_calls": [{}]}),
    "reasoning": data_of(None, delta={"reasoning": "x"}),
    "a finish_reason": data_of("x").replace(b'"finish_reason": null', b'"finish_reason": "stop"'),
    "usage": data_of("x", usage={}),
    "an error": data_of("x", error="x"),
    "two choices": data_of("x", choices=[{"delta": {"content": "x"}}, {"delta": {"content": "x"}}]),
    "invalid UTF-8": BEFORE + b"\xff" + AFTER,
    "its value again behind it": data_of("x", model="x", system_fingerprint="x"),
}


@pytest.mark.parametrize("data", UNLEARNT.values(), ids=UNLEARNT)
def test_what_is_no_plain_token_event_is_not_learnt(data: bytes) -> None:
    assert learn(data) is None


@pytest.mark.parametrize(
    "wire",
    [b"data:%b\n\n", b"data: %b\r\r", b"data: %b\n", b"data: %b\nid: 1\n\n", b"data: %b\r\n\n", b"data: %b", b""],
)
def test_an_event_in_another_framing_is_not_learnt(wire: bytes) -> None:
    """Also one that is not whole in the bytes at hand."""
    data = data_of("x")
    assert TokenTemplate.learn(data, decode_chunk(data), wire.replace(b"%b", data)) is None


def test_the_template_names_the_model() -> None:
    assert learnt(data_of("x", model="m-1")).model == "m-1"
    assert learnt(data_of("x", model=None)).model is None


def test_a_character_that_is_cut_over_two_events_is_no_plain_text() -> None:
    """However many events one read brings, each half is by itself what it is alone: no UTF-8."""
    halves = framed(BEFORE + b"\xc3" + AFTER) + framed(BEFORE + b"\xa9" + AFTER)
    assert learnt(data_of("x")).texts_of(halves) is None
