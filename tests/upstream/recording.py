"""A sink that keeps what an answer says, whichever way it comes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.wire.chat import ChatRequest
from server.wire.chunks import Answerer, Chunk, Delta, DeltaKind

__all__ = ["ASKED", "Recording"]

ASKED = ChatRequest(messages=(("user", "hi"),), max_tokens=5, temperature=0.5)


class Recording:
    """The ChunkSink of a test: ``chunks`` in their order, ``done`` how often it was ended, ``texts`` what was said;
    ``undecoded`` counts the deltas that came as they were on the wire."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.done = 0
        self.undecoded = 0
        self.answerer: Answerer | None = None
        self.wire = b""  # of the deltas that came as they were

    def begin(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def take(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if chunk.texts:
                Recording.take_texts(self, chunk.texts, chunk.wire)
            else:
                self.chunks.append(chunk)

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        assert texts
        self.wire += wire
        self.undecoded += len(texts)
        self.chunks += [Chunk((Delta(DeltaKind.CONTENT, json.loads(b'"' + text + b'"')),)) for text in texts]

    def end(self, chunks: Sequence[Chunk]) -> None:
        Recording.take(self, chunks)
        self.done += 1

    @property
    def texts(self) -> list[str]:
        return [delta.text for chunk in self.chunks for delta in chunk.deltas]
