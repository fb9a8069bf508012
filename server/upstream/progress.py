"""What has been heard of an answer so far, and whether it may be handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from server.errors import UpstreamInvalid
from server.upstream.attempt import AttemptFailed
from server.upstream.circuit import Permit
from server.upstream.silence import SilenceDeadline
from server.wire.chunks import Answerer, Chunk, ChunkSink

__all__ = ["Progress"]

_MAX_HELD: Final = 256 << 10  # bytes of events without content that are kept for those who want them as they came


class Progress:
    """Stands between the tries and ``sink``, and hands on what one of them says.

    What a try says before its first content (a usage, a finish_reason, a model's name) is held back until that comes,
    or the end: a try that comes to nothing must leave no trace in the answer of the next one. ``claim`` is asked then
    whether this answer is still wanted; where it is not, nothing is handed on.
    """

    __slots__ = (
        "_answerer",
        "_claim",
        "_held",
        "_permit",
        "_silence",
        "_sink",
        "_wanted",
        "ended",
        "finished",
        "heard",
    )

    def __init__(self, sink: ChunkSink, claim: Callable[[Progress], bool] | None = None) -> None:
        self._sink = sink
        self._claim = claim
        self._wanted = True
        self._held = Chunk()
        self._permit: Permit | None = None
        self._silence: SilenceDeadline | None = None
        self._answerer = Answerer("")
        self.heard = False  # a delta with content has come
        self.finished = False  # a finish_reason has come
        self.ended = False

    def begin_try(self, permit: Permit, silence: SilenceDeadline) -> None:
        """Forget what the last try said; nothing of it has been handed on. Content that comes is a success of
        ``permit``'s, and pushes the end of ``silence`` back."""
        self._permit = permit
        self._silence = silence
        self._held = Chunk()
        self.finished = False

    def begin(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def take(self, chunks: Sequence[Chunk]) -> None:
        if (chunks := self._listen(chunks)) and self._wanted:
            self._sink.take(chunks)

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        """The hot path."""
        if not self.heard:
            self.take([Chunk(texts=texts, wire=wire)])
            return
        if self._silence is not None:
            self._silence.heard()
        if self._wanted:
            self._sink.take_texts(texts, wire)

    def end(self, chunks: Sequence[Chunk]) -> None:
        if not self.ended:
            self.ended = True
            chunks = self._listen(chunks)
            if not self.heard:
                self._commit()
                chunks = [self._held]
            if self._wanted:
                self._sink.end(chunks)

    def _listen(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Note what ``chunks`` say, and return what is to be handed on now."""
        heard = False
        for chunk in chunks:
            if chunk.deltas or chunk.texts:
                heard = True
            if chunk.finish_reason:
                self.finished = True
        if not (heard or self.heard):
            self._hold(chunks)
            return ()
        if not self.heard:
            self.heard = True
            self._commit()
            chunks = [self._held, *chunks]
            self._held = Chunk()
        if heard and self._silence is not None:
            self._silence.heard()
        return chunks

    def _commit(self) -> None:
        """This try is the one that answers."""
        if self._permit is not None:
            self._permit.succeeded()
        self._wanted = self._claim is None or self._claim(self)
        if self._wanted:
            self._sink.begin(self._answerer)

    def _hold(self, chunks: Sequence[Chunk]) -> None:
        """Keep the last word on each thing, in one chunk: an endpoint may repeat itself for as long as it is let."""
        for chunk in chunks:
            held = self._held
            self._held = Chunk(
                finish_reason=chunk.finish_reason or held.finish_reason,
                usage=chunk.usage or held.usage,
                model=chunk.model or held.model,
                wire=held.wire + chunk.wire,
            )
            if len(self._held.wire) > _MAX_HELD:
                raise AttemptFailed(UpstreamInvalid(), f"{_MAX_HELD} bytes of events without content")
