"""The event-stream parser against the web-platform-tests, every cut of the bytes, and bytes of any kind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.wire.sse import EventStreamParser, EventTooLarge, ServerSentEvent, encode_event

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors" / "eventsource-wpt.json").read_text())

# Every kind of line end, a character of each length, fields with and without space, a comment inside an event.
MIXED = (
    "\ufeffdata: a\r\n\r\n: note\ndata:é中😀\rdata\r\revent: x\nid: 7\n:inside\ndata: last\n\nretry: 12\r\n\ndata: cut"
).encode()


def pieces_of(vector: dict[str, Any]) -> list[bytes]:
    if "chunks_hex" in vector:
        return [bytes.fromhex(piece) for piece in vector["chunks_hex"]]
    return [piece.encode() for piece in vector.get("chunks", [vector["input"]])]


def feed_all(parser: EventStreamParser, *pieces: bytes) -> list[ServerSentEvent]:
    return [event for piece in pieces for event in parser.feed(piece)]


def as_vector(event: ServerSentEvent) -> dict[str, str]:
    texts = (event.type, event.data, event.last_event_id)
    return dict(zip(("type", "data", "lastEventId"), (text.decode("utf-8", "replace") for text in texts), strict=True))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
@pytest.mark.parametrize("cutting", ["as given", "byte by byte", "in one"])
def test_events_are_those_of_the_web_platform_tests(vector: dict[str, Any], cutting: str) -> None:
    """WHATWG HTML §9.2, as browsers are tested on it."""
    pieces = pieces_of(vector)
    whole = b"".join(pieces)
    if cutting == "byte by byte":
        pieces = [whole[i : i + 1] for i in range(len(whole))]
    elif cutting == "in one":
        pieces = [whole]
    parser = EventStreamParser(last_event_id=vector.get("initialLastEventId", "").encode())

    events = feed_all(parser, *pieces)

    assert [as_vector(event) for event in events] == vector["expected"]["events"]
    assert parser.retry == vector["expected"]["retry"]
    assert parser.last_event_id.decode() == vector["expected"]["lastEventIdAfter"]


@pytest.mark.parametrize("cut", range(len(MIXED) + 1))
def test_events_do_not_depend_on_where_the_network_cuts(cut: int) -> None:
    """An event ends at its blank line, never at the end of a packet (§9.2.6)."""
    assert feed_all(EventStreamParser(), MIXED[:cut], MIXED[cut:]) == [
        ServerSentEvent(b"a"),
        ServerSentEvent("é中😀\n".encode()),
        ServerSentEvent(b"last", b"x", b"7"),
    ]


@given(
    st.lists(
        st.sampled_from(
            [b"data", b"id", b"event", b"retry", b":", b" ", b"\r", b"\n", b"x", b"\0", b"\xef\xbb\xbf", b"\xff"]
        )
    ),
    st.data(),
)
def test_any_cutting_of_any_bytes_gives_the_events_of_the_whole(parts: list[bytes], data: st.DataObject) -> None:
    """The parser has no state that a packet's end could show."""
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    one, many = EventStreamParser(), EventStreamParser()

    assert feed_all(many, *pieces) == feed_all(one, whole)
    assert (many.retry, many.last_event_id) == (one.retry, one.last_event_id)


@given(st.text(alphabet=st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])), st.integers(1, 20))
def test_what_is_encoded_is_parsed_back(text: str, step: int) -> None:
    """Line separators that are no line ends here (U+2028, U+0085, VT, FF) come through as text."""
    wire = encode_event(text.encode(), type=b"note", id=b"s.1", retry=5)
    parser = EventStreamParser()

    events = feed_all(parser, *(wire[i : i + step] for i in range(0, len(wire), step)))

    assert events == [ServerSentEvent(text.encode(), b"note", b"s.1")]
    assert parser.retry == 5


def test_the_fields_of_an_event_stand_in_the_contracts_order() -> None:
    assert (
        encode_event(b"{}", type=b"start", id=b"s.0", retry=1000) == b"retry: 1000\nevent: start\nid: s.0\ndata: {}\n\n"
    )
    assert encode_event(b"[DONE]", id=b"s.1") == b"id: s.1\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    "wire", [b"data: " + b"x" * 100, b"data: xxxxxxxx\n" * 10, b"event: " + b"x" * 100 + b"\n", b":" * 100]
)
def test_an_event_or_line_over_the_bound_is_refused(wire: bytes) -> None:
    """A peer may not make us hold more than the bound, however it spreads it."""
    parser = EventStreamParser(max_event_bytes=64)
    with pytest.raises(EventTooLarge):
        feed_all(parser, *(wire[i : i + 7] for i in range(0, len(wire), 7)))


def test_the_events_before_the_one_over_the_bound_are_not_lost() -> None:
    with pytest.raises(EventTooLarge) as caught:
        EventStreamParser(max_event_bytes=64).feed(b"data: good\n\ndata: " + b"x" * 100)
    assert caught.value.events == [ServerSentEvent(b"good")]


def test_comments_of_any_number_count_against_no_bound() -> None:
    """An endpoint that keeps its connection alive with comments sends no event that could be too large."""
    parser = EventStreamParser(max_event_bytes=64)
    assert feed_all(parser, *[b": OPENROUTER PROCESSING\n"] * 1000, b"data: x\n\n") == [ServerSentEvent(b"x")]


def cost_of(size: int) -> float:
    """Seconds to parse one line of ``size`` bytes that comes in packets of 64."""
    parser = EventStreamParser(max_event_bytes=size + 100)
    line = b"data: " + b"x" * size + b"\n\n"
    began = time.process_time()
    feed_all(parser, *(line[i : i + 64] for i in range(0, len(line), 64)))
    return time.process_time() - began


def test_time_is_linear_in_the_bytes() -> None:
    """A line in many small packets must not be scanned from its beginning with each: that would be quadratic."""
    small, large = min(cost_of(100_000) for _ in range(3)), min(cost_of(1_600_000) for _ in range(3))
    assert large < small * 16 * 4  # quadratic would be 16 times more still
