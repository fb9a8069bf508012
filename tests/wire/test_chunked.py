"""Taking the chunked coding off: any cut gives the payload, and what is not usual is left for a full parser, whole."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest
from aiohttp.http import HttpResponseParser
from aiohttp.http_exceptions import BadHttpMessage
from hypothesis import given
from hypothesis import strategies as st

from server.wire.chunked import ChunkedBody

LAST = b"0\r\n\r\n"

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
EXTENSIONS = st.sampled_from([b"", b" ", b"\t ", b";a=b", b' ; a="1;2"', b";"])
ENDS = st.sampled_from(
    [LAST, b"0;x\r\n\r\n", b"000\r\nA: b\r\n\r\n", b"0\r\nETag: x\r\nC: d\r\n\r\nHTTP/1.1 200 OK\r\n"]
)


def framed(payload: bytes, extension: bytes = b"", size: bytes = b"%x") -> bytes:
    return size % len(payload) + extension + b"\r\n" + payload + b"\r\n"


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted(min(place, len(data)) for place in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def feed(*pieces: bytes) -> tuple[bytes, bytes | None]:
    """The payload of ``pieces``, and what is left from where the body ends; what comes behind that is as it came."""
    body, payload, rest = ChunkedBody(), b"", None
    for piece in pieces:
        if rest is None:
            payload += body.feed(piece)
            rest = body.rest
        else:
            rest += piece
    return payload, rest


CUTS = st.lists(st.integers(0, 200), max_size=8)


@given(CHUNKS, EXTENSIONS, st.sampled_from([b"%x", b"%X", b"%08x"]), ENDS, CUTS)
def test_any_cut_gives_the_payload_and_leaves_the_last_chunk(
    chunks: list[bytes], extension: bytes, size: bytes, end: bytes, cuts: list[int]
) -> None:
    """The trailers, and what follows them, are a full parser's (RFC 9112 §7.1.2)."""
    wire = b"".join(framed(chunk, extension, size) for chunk in chunks) + end
    assert feed(*cut(wire, cuts)) == (b"".join(chunks), end)


@given(CHUNKS, CUTS)
def test_a_body_that_goes_on_leaves_nothing(chunks: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(map(framed, chunks))
    assert feed(*cut(wire, cuts)) == (b"".join(chunks), None)


@given(st.lists(st.sampled_from([b"1\r\n", b"a", b"\r\n", b"\r", b"\n", b"0", b";", b"5", b"\0", b"G"])), CUTS)
def test_any_cut_of_any_bytes_is_taken_as_the_whole(parts: list[bytes], cuts: list[int]) -> None:
    """Also where they are no coding at all: the same payload, and the same place where it ends."""
    wire = b"".join(parts)
    assert feed(*cut(wire, cuts)) == feed(wire)


@given(CHUNKS, st.integers(0, 300), CUTS)
def test_payload_is_handed_on_as_soon_as_it_has_come(chunks: list[bytes], end: int, cuts: list[int]) -> None:
    """A token waits for no end of its chunk: what of the wire is no payload is framing."""
    wire = b"".join(map(framed, chunks))[:end]
    payload, _ = feed(*cut(wire, cuts))
    assert b"".join(chunks).startswith(payload)
    assert len(wire) - len(payload) <= sum(len(framed(chunk)) - len(chunk) for chunk in chunks)


@pytest.mark.parametrize("at", range(len(framed(b"hello")) + 1))
def test_a_usual_chunk_may_be_cut_at_any_byte(at: int) -> None:
    wire = framed(b"hello")
    payload = ChunkedBody().feed(wire[:at])
    assert payload == b"hello"[: max(0, at - 3)]
    assert feed(wire[:at], wire[at:], wire) == (b"hellohello", None)


REFUSED = {
    "no number": b"no number\r\n",
    "no size": b"\r\n",
    "a sign": b"-5\r\nhello\r\n",
    "a prefix": b"0x5\r\nhello\r\n",
    "no line end behind a chunk": b"5\r\nhelloworld\r\n",
    "half a line end behind a chunk": b"5\r\nhello\r5\r\nworld\r\n",
    "a bare LF behind a chunk": b"5\r\nhello\n5\r\nworld\r\n",
}
LEFT = REFUSED | {
    "a size that ends with LF": b"5\nhello\n",
    "a huge size": b"fffffffff\r\n",
    "a header without end": b"5;" + b"x" * 300,
}


@pytest.mark.parametrize("wire", REFUSED.values(), ids=REFUSED)
async def test_what_is_malformed_is_left_for_a_parser_that_refuses_it(wire: bytes) -> None:
    """aiohttp's closes the connection, as it does for every framing that is wrong."""
    payload, rest = feed(framed(b"good"), wire)
    assert payload in {b"good", b"goodhello"}
    assert rest
    parser = HttpResponseParser(Mock(_reading_paused=False), asyncio.get_running_loop(), 1 << 16)
    parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(BadHttpMessage):
        parser.feed_data(rest)


@pytest.mark.parametrize("wire", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_what_is_malformed_is_so_however_it_is_cut(wire: bytes, step: int) -> None:
    wire = framed(b"good") + wire
    payload, rest = feed(*[wire[at : at + step] for at in range(0, len(wire), step)])
    assert rest is not None
    assert (payload, rest) == feed(wire)


def test_a_header_that_never_ends_is_not_kept() -> None:
    """A peer may not make us hold what it likes."""
    body, fed = ChunkedBody(), 0
    while body.rest is None:
        body.feed(b";")
        fed += 1
        assert fed < 1000
    assert body.rest == b";" * fed
