"""Our own events: the bytes of the contract's section 3."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RelayError, UpstreamRejected, UpstreamTimeout
from server.wire.chunks import Chunk, Delta, DeltaKind, Usage
from server.wire.events import EventEncoder, EventId, Summary, read_event_id
from server.wire.sse import EventStreamParser

encoder = EventEncoder("SID")

ENDED = Summary(finish_reason=None, usage=Usage(None, 2), tokens=2, model="m", ttft_ms=None, duration_ms=5)


def event_of(text: str, number: int = 1, kind: DeltaKind = DeltaKind.CONTENT) -> bytes:
    """The one event of a delta."""
    [event] = encoder.chunk(number, Chunk((Delta(kind, text),)))
    return event


def test_the_start_names_the_stream_and_the_model() -> None:
    assert encoder.start(0, "m") == [b'retry: 1000\nevent: start\nid: SID.0\ndata: {"id":"SID","model":"m"}\n\n']


def test_a_token_is_a_plain_message() -> None:
    assert event_of("Hello") == b'id: SID.1\ndata: {"token":"Hello"}\n\n'


def test_reasoning_has_its_own_type() -> None:
    assert event_of("hm", 2, DeltaKind.REASONING) == b'event: reasoning\nid: SID.2\ndata: {"reasoning":"hm"}\n\n'


def test_usage_tells_null_where_the_upstream_told_nothing() -> None:
    wire, _ = encoder.complete(3, ENDED)
    assert wire == (
        b'event: usage\nid: SID.3\ndata: {"finish_reason":null,"prompt_tokens":null,"completion_tokens":2,'
        b'"tokens":2,"model":"m","ttft_ms":null,"duration_ms":5}\n\n'
    )


def test_done_is_the_text_that_every_client_knows() -> None:
    _, done = encoder.complete(3, ENDED)
    assert done == b"id: SID.4\ndata: [DONE]\n\n"


def test_a_stop_is_a_usage_that_says_cancelled() -> None:
    """Contract, section 4: viewers get a usage event whose finish_reason is ``cancelled``, then ``[DONE]``."""
    usage, done = encoder.stopped(3, ENDED._replace(finish_reason="stop"))
    assert json.loads(EventStreamParser().feed(usage)[0].data)["finish_reason"] == "cancelled"
    assert done == b"id: SID.4\ndata: [DONE]\n\n"


def test_one_chunk_can_be_several_events() -> None:
    """One delta, one event, in the order in which they came; a tool call is none of this face's."""
    deltas = (Delta(DeltaKind.REASONING, "hm"), Delta(DeltaKind.OTHER, ""), Delta(DeltaKind.CONTENT, "a"))
    assert encoder.chunk(1, Chunk(deltas)) == [event_of("hm", 1, DeltaKind.REASONING), event_of("a", 2)]


def test_a_heartbeat_has_no_id_and_is_no_message() -> None:
    """A page can hear it, ``onmessage`` does not, and it moves no Last-Event-ID."""
    assert encoder.ping() == b"event: ping\ndata: {}\n\n"


def test_a_heartbeat_can_say_when_to_come_back() -> None:
    """In one block with its data: some clients take a ``retry`` that stands alone for an event."""
    assert encoder.ping(2500) == b"retry: 2500\nevent: ping\ndata: {}\n\n"


@pytest.mark.parametrize("retry_ms", [None, 0, 1000])
def test_a_heartbeat_leaves_a_client_where_it_is(retry_ms: int | None) -> None:
    """Without an id it does not reset what the client will send as ``Last-Event-ID``."""
    [token, heartbeat] = EventStreamParser().feed(event_of("a", 7) + encoder.ping(retry_ms))
    assert token.last_event_id == heartbeat.last_event_id == b"SID.7"
    assert (heartbeat.type, heartbeat.data) == (b"ping", b"{}")


@pytest.mark.parametrize(("error", "retryable"), [(UpstreamTimeout(), True), (UpstreamRejected(), False)])
def test_a_failure_is_a_plain_message_in_our_words(error: RelayError, retryable: bool) -> None:
    """Not an event named ``error``: that is what EventSource calls its own connection errors."""
    [event] = EventStreamParser().feed(b"".join(encoder.failed(5, error)))
    assert event.type == b"message"
    assert json.loads(event.data) == {"error": error.code, "message": error.message, "retryable": retryable}


def test_half_a_surrogate_pair_stays_a_json_escape() -> None:
    assert event_of("\ud83d") == b'id: SID.1\ndata: {"token":"\\ud83d"}\n\n'


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_a_token_of_any_text_is_one_event_with_exactly_that_text(text: str) -> None:
    [event] = EventStreamParser().feed(event_of(text, 9))
    assert json.loads(event.data) == {"token": text}
    assert event.last_event_id == b"SID.9"


# ---- Ids that come back

SID = "Az09_-" * 6
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

READ = {
    f"{SID}.0": EventId(SID, 0),
    f"{SID}.1": EventId(SID, 1),
    f"{SID}.007": EventId(SID, 7),
    f"{SID}.{10**100 - 1}": EventId(SID, 10**100 - 1),
    f"{'-' * 22}.12": EventId("-" * 22, 12),
    f"{'a' * 64}.12": EventId("a" * 64, 12),
}


@pytest.mark.parametrize(("text", "meant"), READ.items())
def test_an_event_id_is_a_stream_and_a_number(text: str, meant: EventId) -> None:
    assert read_event_id(text) == meant


NO_ID = [
    *("", ".", "0", SID, f"{SID}.", ".0", f"{SID}0", f" {SID}.0", f"{SID}.0 ", f"{SID}.0\n", f"{SID}. 0", f"{SID} .0"),
    *(f"{SID}.{number}" for number in ("-1", "+1", "1e3", "1.0", "0x1", "1_0", "a", "None", "1,2")),
    *(f"{SID}.{digit}" for digit in "\u0663\uff13\u00b2\u0967\U0001d7ce"),
    *(f"{SID}.{'1' * 101}", f"{SID}.{'1' * 10_000}", f"{'a' * 21}.0", f"{'a' * 65}.0", f"{'a' * 10_000}.0"),
    *(f"{SID}{character}.0" for character in "é./+=%\0\n ~\udcff"),
    *(f"{SID}.0{character}" for character in "é./+=%\0\n\r\u2028\udcff"),
    f"{SID}.0{SID}.0",
]


@pytest.mark.parametrize("text", NO_ID, ids=lambda text: ascii(text)[-30:])
def test_what_is_no_event_id_is_not_read_as_one(text: str) -> None:
    """Row A23: ``SID.N`` to the letter, N a plain decimal in ASCII."""
    assert read_event_id(text) is None


@given(st.text(alphabet=ALPHABET, min_size=22, max_size=64), st.integers(0, 10**20 - 1))
def test_an_id_of_ours_is_read_as_it_was_meant(stream_id: str, number: int) -> None:
    [event] = EventStreamParser().feed(b"".join(EventEncoder(stream_id).failed(number, UpstreamTimeout())))
    assert read_event_id(event.last_event_id.decode("ascii")) == EventId(stream_id, number)


@given(st.text() | st.text(alphabet=ALPHABET + ".+\u0663 \n", min_size=20, max_size=90))
def test_whatever_is_read_as_an_id_is_one(text: str) -> None:
    """It is echoed and looked up, so nothing else may pass."""
    if (seen := read_event_id(text)) is not None:
        assert text == f"{seen.stream_id}.{seen.number}"
        assert set(seen.stream_id) <= set(ALPHABET)
        assert 22 <= len(seen.stream_id) <= 64
