"""Our own events: the bytes of the contract's section 3."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RelayError, UpstreamRejected, UpstreamTimeout
from server.wire.chunks import Usage
from server.wire.events import PING, EventEncoder
from server.wire.sse import EventStreamParser

encoder = EventEncoder("SID")


def test_the_start_names_the_stream_and_the_model() -> None:
    assert encoder.start(0, "m") == b'retry: 1000\nevent: start\nid: SID.0\ndata: {"id":"SID","model":"m"}\n\n'


def test_a_token_is_a_plain_message() -> None:
    assert encoder.token(1, "Hello") == b'id: SID.1\ndata: {"token":"Hello"}\n\n'


def test_reasoning_has_its_own_type() -> None:
    assert encoder.reasoning(2, "hm") == b'event: reasoning\nid: SID.2\ndata: {"reasoning":"hm"}\n\n'


def test_usage_tells_null_where_the_upstream_told_nothing() -> None:
    wire = encoder.usage(3, finish_reason=None, usage=Usage(None, 2), tokens=2, model="m", ttft_ms=None, duration_ms=5)
    assert wire == (
        b'event: usage\nid: SID.3\ndata: {"finish_reason":null,"prompt_tokens":null,"completion_tokens":2,'
        b'"tokens":2,"model":"m","ttft_ms":null,"duration_ms":5}\n\n'
    )


def test_done_is_the_text_that_every_client_knows() -> None:
    assert encoder.done(4) == b"id: SID.4\ndata: [DONE]\n\n"


def test_a_heartbeat_has_no_id_and_is_no_message() -> None:
    """A page can hear it, ``onmessage`` does not, and it moves no Last-Event-ID."""
    assert PING == b"event: ping\ndata: {}\n\n"


@pytest.mark.parametrize(("error", "retryable"), [(UpstreamTimeout(), True), (UpstreamRejected(), False)])
def test_a_failure_is_a_plain_message_in_our_words(error: RelayError, retryable: bool) -> None:
    """Not an event named ``error``: that is what EventSource calls its own connection errors."""
    [event] = EventStreamParser().feed(encoder.error(5, error))
    assert event.type == b"message"
    assert json.loads(event.data) == {"error": error.code, "message": error.message, "retryable": retryable}


def test_half_a_surrogate_pair_stays_a_json_escape() -> None:
    assert encoder.token(1, "\ud83d") == b'id: SID.1\ndata: {"token":"\\ud83d"}\n\n'


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_a_token_of_any_text_is_one_event_with_exactly_that_text(text: str) -> None:
    [event] = EventStreamParser().feed(encoder.token(9, text))
    assert json.loads(event.data) == {"token": text}
    assert event.last_event_id == b"SID.9"
