"""An answer's bytes to what they say: however they are cut, and whether or not the short cut is taken."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.upstream.attempt import AttemptFailed
from server.upstream.reader import MAX_MALFORMED_EVENTS, AnswerReader
from server.wire.chunks import DONE, Chunk, MalformedChunk, Usage, decode_chunk
from server.wire.shapes import KnownShapes
from server.wire.sse import EventStreamParser
from server.wire.template import TokenTemplate
from tests.upstream.recording import Recording
from tests.upstream_sim import chunk


def event(value: Any, line_end: bytes = b"\n") -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    return b"data: " + data + 2 * line_end


def token(text: str, **fields: Any) -> bytes:
    return event(chunk({"content": text}, **fields))


def cut(wire: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted(min(place, len(wire)) for place in cuts)
    return [wire[a:b] for a, b in zip([0, *places], [*places, len(wire)], strict=True)]


def read(*pieces: bytes, shapes: KnownShapes | None = None) -> tuple[Recording, AnswerReader]:
    sink = Recording()
    reader = AnswerReader(sink, shapes=shapes)
    for piece in pieces:
        if not reader.over:
            reader.feed(piece)
    return sink, reader


class Said(NamedTuple):
    """What an answer came to."""

    texts: list[str]
    model: str | None
    finish_reasons: list[str]
    usages: list[Usage]
    done: int


def said_by(chunks: list[Chunk], done: int) -> Said:
    return Said(
        [delta.text for chunk in chunks for delta in chunk.deltas],
        next((chunk.model for chunk in reversed(chunks) if chunk.model), None),
        [chunk.finish_reason for chunk in chunks if chunk.finish_reason],
        [chunk.usage for chunk in chunks if chunk.usage],
        done,
    )


def decoded(wire: bytes) -> Said:
    """The same, each event decoded by itself."""
    chunks: list[Chunk] = []
    for found in EventStreamParser().feed(wire):
        if found.data == DONE:
            return said_by(chunks, 1)
        with contextlib.suppress(MalformedChunk):
            chunks.append(decode_chunk(found.data))
    return said_by(chunks, 0)


TOKENS = st.sampled_from(["Hel", "lo", " ", "é中😀", 'q"', "a\nb", "", "stop", "sim", "c-1"])
EVENTS = st.one_of(
    TOKENS.map(token),
    TOKENS.map(token),
    st.sampled_from(
        [
            token("x", model="sim-2"),
            token("x", obfuscation="aB"),
            event(chunk({"content": "x"}), b"\r\n"),
            event(chunk({"content": "x"}), b"\r"),
            event(chunk({"role": "assistant", "content": ""})),
            event(chunk({"role": "assistant"}, model="sim-3")),
            event(chunk({"reasoning": "hm"})),
            event(chunk({}, "stop")),
            event(chunk({"content": "last"}, "length")),
            event(chunk(usage={"prompt_tokens": 1, "completion_tokens": 2})),
            event(chunk(model="sim-2"))[:-3] + b',"model":null}\n\n',
            event(b'{"id":"c-1","object":"chat.completion.chunk","created":1,"model":"sim-2","choices":[oops'),
            token("x").replace(b'"created": 1', b'"created": 1' + b"0" * 4400),
            token("\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
            token("<half>").replace(b"<half>", b"a\xc3"),
            b": comment\n",
            b": comment\n\n",
            b"\n",
            b"id: 7\n",
            b"retry: 5\n\n",
            b"data: not JSON\n\n",
            b"data: [1]\n\n",
            b'data: {"choices":[\ndata: {"delta":{"content":"two lines"}}]}\n\n',
            b'data:{"choices":[{"delta":{"content":"no space"}}]}\n\n',
        ]
    ),
)
ENDS = st.sampled_from([b"", event(DONE), event(DONE) + token("behind"), token("cut")[:-1], token("cut")[:-20]])
WIRES = st.builds(lambda events, end: b"".join([*events, end]), st.lists(EVENTS, max_size=10), ENDS)
CUTS = st.lists(st.integers(0, 1500), max_size=10)


@given(WIRES, CUTS)
def test_however_the_bytes_are_cut_they_say_what_each_event_says(wire: bytes, cuts: list[int]) -> None:
    sink, reader = read(*cut(wire, cuts))
    # Texts that came undecoded name no model: it is that of the event which the template was learnt from.
    assert said_by(sink.chunks, sink.done) == decoded(wire)
    assert reader.over is (sink.done == 1)


@given(st.lists(st.sampled_from(["Hel", "lo", "é中😀"]), min_size=3, max_size=12), CUTS, st.booleans())
def test_tokens_of_one_frame_come_in_their_order(texts: list[str], cuts: list[int], crlf: bool) -> None:
    line_end = b"\r\n" if crlf else b"\n"
    wire = b"".join(event(chunk({"content": text}), line_end) for text in texts)
    sink, _ = read(*cut(wire, cuts))
    assert sink.texts == texts


# ---- The short cut

USUAL = [str(number) for number in range(100)]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_usual_stream_is_decoded_once(line_end: bytes) -> None:
    """The first of its tokens; each read brings one event."""
    sink, _ = read(*[event(chunk({"content": text}), line_end) for text in USUAL])
    assert sink.texts == USUAL
    assert sink.undecoded == len(USUAL) - 1


@pytest.mark.parametrize("step", [50, 100, 141, 1000])
def test_reads_that_cut_events_take_the_short_cut_too(step: int) -> None:
    """Once one event has come whole; but where the cut goes through a line end."""
    first, *others = map(token, USUAL)
    wire = b"".join(others)
    sink, _ = read(first, *[wire[at : at + step] for at in range(0, len(wire), step)])
    assert sink.texts == USUAL
    assert sink.undecoded > len(USUAL) * 0.9


@pytest.mark.parametrize("between", [b": ping\n\n", token("a\nb"), event(chunk({"role": "assistant"})), b"\n"])
def test_what_has_to_be_decoded_ends_no_short_cut(between: bytes) -> None:
    sink, _ = read(*map(token, USUAL), between, *map(token, USUAL))
    assert sink.undecoded > 190


class Lessons:
    """Counts what is learnt from, and what is decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.decoded = 0
        learn = TokenTemplate.learn

        def counted(data: bytes, chunk: Chunk, wire: bytes) -> TokenTemplate | None:
            self.count += 1
            return learn(data, chunk, wire)

        def decode(data: bytes, *, verbatim: bool) -> Chunk:
            self.decoded += 1
            return decode_chunk(data, verbatim=verbatim)

        patch.setattr(TokenTemplate, "learn", counted)
        patch.setattr("server.upstream.reader.decode_chunk", decode)


@pytest.mark.parametrize("together", [1, 10])
def test_learning_is_given_up_where_the_frame_changes_with_each_event(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """A padding, or a time of day: learning would cost more than it saves."""
    lessons = Lessons(monkeypatch)
    events = [token(text, created=number) for number, text in enumerate(USUAL)]
    sink, _ = read(*[b"".join(events[at : at + together]) for at in range(0, len(events), together)])
    assert sink.texts == USUAL
    assert lessons.count <= 5
    assert lessons.decoded == len(USUAL)


def test_learning_is_not_given_up_where_the_frame_changes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time in seconds, at a hundred tokens a second."""
    lessons = Lessons(monkeypatch)
    events = [token(text, created=number // 10) for number, text in enumerate(USUAL)]
    sink, _ = read(*events)
    assert sink.texts == USUAL
    assert sink.undecoded == 90
    assert lessons.count == 10


@pytest.mark.parametrize("last", [token("x", model="sim-2"), event(chunk({"role": "assistant"}, model="sim-2"))])
@pytest.mark.parametrize("behind", ["in one read", "in reads of their own"])
def test_the_model_that_is_named_last_is_reported_last(last: bytes, behind: str) -> None:
    """The answer's usage event tells who answered."""
    tokens = [token(text) for text in USUAL[:5]]
    named = [last, *[token(text, model="sim-2") for text in USUAL[:5]], token("y", model="sim-3")]
    sink, _ = read(*tokens, *([b"".join(named)] if behind == "in one read" else named))
    assert [chunk.model for chunk in sink.chunks if chunk.model][-2:] == ["sim-2", "sim-3"]
    sink, _ = read(*tokens, *named, *tokens)
    assert said_by(sink.chunks, 0).model == "sim"


# ---- What other answers of the endpoint have shown


def answer(number: int, texts: list[str], **fields: Any) -> bytes:
    """A whole one, as most endpoints write it."""
    fields = {"id": f"chatcmpl-{number}", "created": number, **fields}
    return b"".join(
        [
            event(chunk({"role": "assistant", "content": ""}, **fields)),
            *(token(text, **fields) for text in texts),
            event(chunk({}, "stop", **fields)),
            event(chunk(usage={"prompt_tokens": 1, "completion_tokens": 2}, **fields)),
            event(DONE),
        ]
    )


@pytest.mark.parametrize("events", ["in one read", "in reads of their own"])
def test_of_a_later_answer_only_the_usage_is_decoded(monkeypatch: pytest.MonkeyPatch, events: str) -> None:
    """Once the frame has been seen to hold in one answer, and each kind of event in another."""
    shapes, lessons, decoded_before = KnownShapes(), Lessons(monkeypatch), 0
    for number in range(3):
        wire = answer(number, USUAL[:8], model=f"sim-{number}")
        reads = [wire] if events == "in one read" else [block + b"\n\n" for block in wire.split(b"\n\n")[:-1]]
        sink, _ = read(*reads, shapes=shapes)
        assert said_by(sink.chunks, sink.done) == decoded(wire)
        needed, decoded_before = lessons.decoded - decoded_before, lessons.decoded
    assert needed == 1
    assert lessons.count == 2


def test_a_frame_that_never_held_is_not_remembered() -> None:
    """Where an endpoint pads its events, looking for what is known would be in vain each time."""
    shapes = KnownShapes()
    wire = b"".join([*(token(text, obfuscation="x" * place) for place, text in enumerate(USUAL)), event(DONE)])
    read(wire, shapes=shapes)
    assert shapes.recognise(wire[6:]) is None


ANSWERS = st.builds(
    lambda number, texts, model: answer(number, texts, model=model),
    st.integers(0, 3),
    st.lists(TOKENS, max_size=4),
    st.sampled_from(["sim", "sim-2", "é"]),
)


@given(st.lists(st.one_of(ANSWERS, WIRES), max_size=5), st.one_of(ANSWERS, WIRES), CUTS)
def test_whatever_was_answered_before_an_answer_says_what_its_events_say(
    before: list[bytes], wire: bytes, cuts: list[int]
) -> None:
    shapes = KnownShapes()
    for earlier in before:
        with contextlib.suppress(AttemptFailed):
            read(earlier, shapes=shapes)
    sink, reader = read(*cut(wire, cuts), shapes=shapes)
    assert said_by(sink.chunks, sink.done) == decoded(wire)
    assert reader.finished is any(chunk.finish_reason for chunk in sink.chunks)


# ---- The end


@pytest.mark.parametrize("learnt", [0, 5])
def test_nothing_behind_done_is_taken(learnt: int) -> None:
    sink, reader = read(*[token("x")] * learnt, token("y") + event(DONE) + token("z") + event(DONE))
    assert sink.texts == ["x"] * learnt + ["y"]
    assert sink.done == 1
    assert reader.over


def test_a_finish_reason_is_noted_before_done() -> None:
    _, reader = read(token("x"), token("y"))
    assert not reader.finished
    _, reader = read(token("x"), token("y"), event(chunk({}, "stop")))
    assert reader.finished
    assert not reader.over


MALFORMED = b"data: not JSON\n\n"


@pytest.mark.parametrize("together", [True, False])
def test_more_than_ten_malformed_events_are_no_stream(together: bool) -> None:
    """What is good before that is handed on."""
    sink = Recording()
    reader = AnswerReader(sink)
    for good in (
        [b"".join([MALFORMED, token("x")] * MAX_MALFORMED_EVENTS)]
        if together
        else [
            MALFORMED,
            token("x"),
        ]
        * MAX_MALFORMED_EVENTS
    ):
        reader.feed(good)
    with pytest.raises(AttemptFailed) as caught:
        reader.feed(token("last") + MALFORMED + token("behind"))
    assert caught.value.error.code == "upstream_invalid"
    assert sink.texts == ["x"] * 10 + ["last"]


@pytest.mark.parametrize(
    "failure", [event({"error": {"message": "x"}}), b"event: error\n" + token("x"), b"event: error\ndata: x\n\n"]
)
@pytest.mark.parametrize("learnt", [1, 5])
def test_an_error_in_the_stream_ends_it_behind_what_was_good(failure: bytes, learnt: int) -> None:
    """Also one that looks like a token but for the event's type."""
    sink = Recording()
    reader = AnswerReader(sink)
    reader.feed(token("x") * learnt)
    with pytest.raises(AttemptFailed):
        reader.feed(token("y") + failure + token("z"))
    assert sink.texts == ["x"] * learnt + ["y"]


def test_an_event_without_end_is_no_stream() -> None:
    """The short cut keeps no line longer than the parser would."""
    sink = Recording()
    reader = AnswerReader(sink)
    reader.feed(token("x") + token("y") + b"data: ")
    for _ in range(31):
        reader.feed(b"z" * (32 << 10))
    with pytest.raises(AttemptFailed) as caught:
        reader.feed(b"z" * (32 << 10))
    assert caught.value.error.code == "upstream_invalid"
    assert sink.texts == ["x", "y"]


# ---- Verbatim


class Passing(Recording):
    """Joins what would be passed on, whichever way it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = b""

    def take(self, chunks: Sequence[Chunk]) -> None:
        super().take(chunks)
        self.passed += b"".join(chunk.wire for chunk in chunks)

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        super().take_texts(texts, wire)
        self.passed += wire

    def end(self, chunks: Sequence[Chunk]) -> None:
        super().end(chunks)
        self.passed += b"".join(chunk.wire for chunk in chunks)


def read_verbatim(*pieces: bytes) -> Passing:
    sink = Passing()
    reader = AnswerReader(sink, verbatim=True)
    for piece in pieces:
        if not reader.over:
            reader.feed(piece)
    return sink


def data_lines(wire: bytes) -> bytes:
    """The data lines of the whole events in ``wire`` before ``[DONE]``, but for malformed ones: each event closed by a
    blank line, its line ends LF."""
    blocks = wire.replace(b"\r\n", b"\n").replace(b"\r", b"\n").lstrip(b"\n").split(b"\n\n")[:-1]
    kept = b""
    for block in blocks:
        lines = [line for line in block.split(b"\n") if line == b"data" or line.startswith(b"data:")]
        data = b"\n".join(line[5:].removeprefix(b" ") for line in lines)
        if data == DONE:
            break
        with contextlib.suppress(MalformedChunk):
            if lines:
                decode_chunk(data)
                kept += b"\n".join(lines) + b"\n\n"
    return kept


TOKEN = json.dumps(chunk({"content": "Hel"})).encode()
HALF = TOKEN.partition(b'"choices"')

AS_IT_CAME = {
    "as usual": b"data: " + TOKEN,
    "no space behind the colon": b"data:" + TOKEN,
    "two spaces": b"data:  " + TOKEN,
    "spaces at the end": b"data: " + TOKEN + b" \t",
    "several data lines": b"data: " + HALF[0] + b"\ndata:" + b"".join(HALF[1:]),
    "an empty data line": b"data\ndata: " + TOKEN,
    "spaced JSON": b'data: { "choices" : [ ] }',
    "escapes": b'data: {"choices":[{"delta":{"content":"\\u00e9\\/\\ud83d"}}]}',
    "odd numbers and fields": b'data: {"x":1e400,"y":12345678901234567890123,"z":-0.0,"choices":[]}',
    "invalid UTF-8": b'data: {"choices":[{"delta":{"content":"\xff\xc3"}}]}',
}


@pytest.mark.parametrize("learnt", [0, 3], ids=["first", "behind others"])
@pytest.mark.parametrize("lines", AS_IT_CAME.values(), ids=AS_IT_CAME.keys())
def test_data_lines_are_passed_on_as_they_came(lines: bytes, learnt: int) -> None:
    """Section 5: byte for byte and in order; a surrogate stays as it came. Each event is closed by a blank line."""
    before = [token(text) for text in USUAL[:learnt]]
    assert read_verbatim(*before, lines + b"\n\n").passed == b"".join(before) + lines + b"\n\n"


WITHOUT = {
    "CRLF": b"data: " + TOKEN + b"\r\n\r\n",
    "CR": b"data: " + TOKEN + b"\r\r",
    "a comment before": b": ping\ndata: " + TOKEN + b"\n\n",
    "a comment inside": b"data: " + TOKEN + b"\n: ping\n\n",
    "a comment alone": b": OPENROUTER PROCESSING\n\ndata: " + TOKEN + b"\n\n",
    "other fields": b"event: x\nid: 7\nretry: 5\nfoo: bar\ndata: " + TOKEN + b"\n\n",
    "fields without data": b"event: x\nid: 7\n\ndata: " + TOKEN + b"\n\n",
    "blank lines": b"\n\n\ndata: " + TOKEN + b"\n\n\n",
    "an event that is no chunk": b"data: not JSON\n\ndata: " + TOKEN + b"\n\n",
    "an event without its blank line": b"data: " + TOKEN + b"\n\ndata: " + TOKEN + b"\n",
    "done": b"data: " + TOKEN + b"\n\ndata: [DONE]\n\ndata: " + TOKEN + b"\n\n",
}


@pytest.mark.parametrize("learnt", [0, 3], ids=["first", "behind others"])
@pytest.mark.parametrize("sent", WITHOUT.values(), ids=WITHOUT.keys())
def test_nothing_but_data_lines_is_passed_on(sent: bytes, learnt: int) -> None:
    """Section 5: comments and other fields of the upstream are dropped; ``[DONE]`` is for who passes it on to say."""
    before = [event(chunk({"content": text}, id="c-2")) for text in USUAL[:learnt]]
    assert read_verbatim(*before, sent).passed == b"".join(before) + b"data: " + TOKEN + b"\n\n"


def test_a_byte_order_mark_is_not_passed_on() -> None:
    assert read_verbatim(b"\xef\xbb\xbf" + token("x")).passed == token("x")


@pytest.mark.parametrize("step", [7, 50, 141, 1000, 100_000])
def test_the_short_cut_hands_on_the_very_bytes(step: int) -> None:
    """However they are cut."""
    first, *others = map(token, USUAL)
    wire = b"".join(others)
    sink = read_verbatim(first, *[wire[at : at + step] for at in range(0, len(wire), step)])
    assert sink.undecoded > 80
    assert sink.texts == USUAL
    assert sink.passed == first + wire


@pytest.mark.parametrize("step", [7, 50, 141, 1000, 100_000])
def test_the_short_cut_may_leave_line_ends_as_they_are(step: int) -> None:
    """CRLF ends a line as well as LF does (WHATWG HTML §9.2.5)."""
    wire = b"".join(event(chunk({"content": text}), b"\r\n") for text in USUAL)
    sink = read_verbatim(*[wire[at : at + step] for at in range(0, len(wire), step)])
    assert sink.texts == USUAL
    assert sink.passed.replace(b"\r\n", b"\n") == wire.replace(b"\r\n", b"\n")


def test_who_does_not_pass_it_on_is_not_given_the_bytes() -> None:
    """They would be kept with each chunk that is held back, for nobody."""
    sink, _ = read(token("a\nb"), event(chunk({"role": "assistant"})))
    assert [chunk.wire for chunk in sink.chunks] == [b"", b""]


@given(st.lists(TOKENS.map(token), max_size=12), CUTS)
def test_all_that_was_sent_is_passed_on_however_it_is_cut(events: list[bytes], cuts: list[int]) -> None:
    """Section 5: byte for byte and in order."""
    wire = b"".join(events)
    assert read_verbatim(*cut(wire, cuts)).passed == wire


@given(WIRES, CUTS)
def test_of_any_stream_the_data_lines_are_passed_on_however_it_is_cut(wire: bytes, cuts: list[int]) -> None:
    """Section 5: the rest is dropped, and so is an event that is no chunk."""
    sink = read_verbatim(*cut(wire, cuts))
    assert sink.passed.replace(b"\r\n", b"\n") == data_lines(wire)


@given(WIRES, CUTS)
def test_what_is_said_does_not_depend_on_whether_the_bytes_are_passed_on(wire: bytes, cuts: list[int]) -> None:
    one, other = read(*cut(wire, cuts))[0], read_verbatim(*cut(wire, cuts))
    assert said_by(one.chunks, one.done) == said_by(other.chunks, other.done)


@pytest.mark.parametrize("verbatim", [False, True])
def test_a_whole_answer_in_one_read_is_handed_on_at_once(verbatim: bool) -> None:
    """And so in one write, with the plain tokens of it as they came."""
    calls: list[tuple[str, list[Chunk]]] = []

    class Calls(Recording):
        def take(self, chunks: Sequence[Chunk]) -> None:
            calls.append(("take", list(chunks)))

        def end(self, chunks: Sequence[Chunk]) -> None:
            calls.append(("end", list(chunks)))

    tokens = [token(text) for text in ("one", "two", "three", '"four"', "five")]
    reader = AnswerReader(Calls(), verbatim=verbatim)
    reader.feed(b"".join(tokens) + event(chunk({}, finish_reason="stop")) + event(DONE))
    [(called, chunks)] = calls
    assert called == "end"
    assert [text for chunk in chunks for text in chunk.texts] == [b"two", b"three", b"five"]
    if verbatim:
        assert b"".join(chunk.wire for chunk in chunks) == b"".join(tokens) + event(chunk({}, finish_reason="stop"))
