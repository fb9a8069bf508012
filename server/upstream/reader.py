"""An answer's bytes to what they say: events to chunks, or, where the template fits, to texts with nothing decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from server.errors import UpstreamInvalid
from server.upstream.attempt import AttemptFailed, failed_in_stream
from server.wire.chunks import DONE, Chunk, ChunkSink, MalformedChunk, decode_chunk
from server.wire.shapes import KnownShapes
from server.wire.sse import EventStreamParser, EventTooLarge, ServerSentEvent
from server.wire.template import TokenTemplate

__all__ = ["MAX_MALFORMED_EVENTS", "AnswerReader"]

MAX_MALFORMED_EVENTS: Final = 10  # in one answer; an endpoint with more does not speak the format
_MAX_TAIL: Final = 4096  # bytes of a line that has begun; the parser, which copies nothing twice, takes longer ones
_MALFORMED: Final = Chunk()  # what is made of an event that is no chunk
_LESSONS: Final = 3  # templates that are learnt in vain before an endpoint is known for one whose frames change


class AnswerReader:
    """Reads one answer: the bytes of its body in, cut anywhere, and what they say to ``sink``, once a call.

    No I/O. ``over`` says that ``[DONE]`` has come, ``finished`` that a finish_reason has: from there on a close is a
    clean end. ``verbatim``: each chunk carries its event as it came. ``shapes`` is what is known of the endpoint's
    events, and what is found out is added there.
    """

    __slots__ = (
        "_begun",
        "_envelope",
        "_fitted",
        "_lessons",
        "_malformed",
        "_parser",
        "_shapes",
        "_sink",
        "_tail",
        "_template",
        "_verbatim",
        "finished",
        "over",
    )

    def __init__(self, sink: ChunkSink, *, verbatim: bool = False, shapes: KnownShapes | None = None) -> None:
        self._sink = sink
        self._verbatim = verbatim
        self._shapes = None if verbatim else shapes  # of events that are passed on there is more to be said
        self._begun = False
        self._envelope = 0  # bytes before the choices in each event of a known shape
        self._parser = EventStreamParser(keep_lines=verbatim)
        self._template: TokenTemplate | None = None
        self._lessons = _LESSONS
        self._fitted = False  # since the template was learnt
        self._tail = b""  # a line that has begun, while the short cut is open: the parser stands between events
        self._malformed = 0
        self.finished = False
        self.over = False

    def feed(self, data: bytes) -> bool:
        """Take the next bytes, and tell whether ``[DONE]`` has come. What is good is handed on before there is a
        complaint about what is not.

        Raises AttemptFailed for what is no OpenAI stream, and what the sink raises.
        """
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if self._template is None or not self._parser.between_events or not self._take_short_cut(self._template, data):
            self._parse(data)
        return self.over

    def end(self) -> None:
        """The body has ended, behind a finish_reason: all was said."""
        self._remember()
        self._sink.end(())

    def _take_short_cut(self, template: TokenTemplate, data: bytes) -> bool:
        """Hand on the texts of ``data`` if it is events that fit, the last of them perhaps cut; the hot path."""
        texts = template.texts_of(data)
        if texts is None:
            whole = data.rfind(template.blank) + len(template.blank)
            rest = data[whole:] if whole >= len(template.blank) else data
            # A line that has not ended hides no event that is complete.
            if not rest or len(rest) > _MAX_TAIL or b"\n" in rest or b"\r" in rest:
                return False
            if rest is not data:
                data = data[:whole]
                texts = template.texts_of(data)
                if texts is None:
                    return False
            self._tail = rest
        if texts:
            self._fitted = True
            self._sink.take_texts(texts, data)
        return True

    def _parse(self, data: bytes) -> None:
        failure = None
        try:
            events = self._parser.feed(data)
        except EventTooLarge as exc:
            events = exc.events
            failure = AttemptFailed(UpstreamInvalid(), str(exc))
        chunks: list[Chunk] = []
        if events and not self._begun:
            self._begun = True
            chunks += self._recognise(events[0])
        at = 0
        while at < len(events):
            if self._template is not None and (run := self._template.run_of(events, at)):
                self._fitted = True
                chunks += self._chunks_of(run, events, at)
                at += len(run)
                continue
            event = events[at]
            at += 1
            if event.data == DONE:
                self.over = True
                break
            try:
                chunk = self._read(event, data)
            except AttemptFailed as exc:
                failure = exc
                break
            if self._verbatim and chunk is not _MALFORMED:
                chunk = chunk._replace(wire=event.lines + b"\n\n")
            chunks.append(chunk)
        if self.over:
            self._remember()
            self._sink.end(chunks)
            return
        if chunks:
            self._sink.take(chunks)
        if failure is not None:
            raise failure
        if self._template is not None:
            self._tail = self._parser.give_back(_MAX_TAIL)

    def _recognise(self, first: ServerSentEvent) -> Iterable[Chunk]:
        """Begin with what other answers have shown, if this one's ``first`` event is of the same shape."""
        known = None if self._shapes is None or first.type != b"message" else self._shapes.recognise(first.data)
        if known is None:
            return ()
        self._template, self._envelope = known
        return (Chunk(model=self._template.model),)

    def _remember(self) -> None:
        """Let later answers know the frame that this one's tokens were found to have."""
        if self._shapes is not None and self._template is not None and self._fitted and not self._envelope:
            self._shapes.remember(self._template)

    def _chunks_of(self, run: Sequence[bytes], events: Sequence[ServerSentEvent], first: int) -> Iterable[Chunk]:
        """What the events from ``first`` on say, whose texts are ``run``."""
        if self._verbatim:  # events that fit may still differ in what stands before their data
            return [Chunk(wire=events[first + place].lines + b"\n\n", texts=(text,)) for place, text in enumerate(run)]
        return (Chunk(texts=run),)

    def _read(self, event: ServerSentEvent, wire: bytes) -> Chunk:
        if (known := self._known(event)) is not None:
            if known.finish_reason:
                self.finished = True
            return known
        try:
            chunk = decode_chunk(event.data, verbatim=self._verbatim)
        except MalformedChunk:
            if event.type == b"error":
                raise failed_in_stream(None) from None
            self._malformed += 1
            if self._malformed > MAX_MALFORMED_EVENTS:
                raise AttemptFailed(UpstreamInvalid(), f"more than {MAX_MALFORMED_EVENTS} malformed events") from None
            return _MALFORMED
        if chunk.error is not None or event.type == b"error":
            raise failed_in_stream(chunk.error)
        if chunk.finish_reason:
            self.finished = True
        self._learn(event.data, chunk, wire)
        if self._shapes is not None and not chunk.deltas:
            self._shapes.note(event.data, chunk)
        return chunk

    def _known(self, event: ServerSentEvent) -> Chunk | None:
        """What other answers have shown that it says, but for the model."""
        if not self._envelope or self._shapes is None or self._template is None:
            return None
        data, size = event.data, self._envelope
        if event.type != b"message" or data[:size] != self._template.before[:size]:
            return None
        return self._shapes.meaning_of(data[size:])

    def _learn(self, data: bytes, chunk: Chunk, wire: bytes) -> None:
        """Take a token event for the template of those to come. Where no later event ever fits (a padding that changes,
        a time of day), learning is given up: it costs more than it saves."""
        template = self._template
        if template is not None and chunk.model is not None and chunk.model != template.model:
            self._template = template = None  # what fits it would no longer name the model that answered last
            self._envelope = 0
        if not chunk.deltas or (self._lessons == 0 and not self._fitted):
            return
        learnt = TokenTemplate.learn(data, chunk, wire)
        if learnt is not None:
            self._lessons = _LESSONS if self._fitted else self._lessons - 1
            self._fitted = False
            self._template = learnt
            self._envelope = 0
