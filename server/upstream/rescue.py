"""An answer that broke off half-way, finished by another upstream: nothing that was read is said twice, or changed.

The rescuer is given the answer so far as the assistant's own words. Some go on behind them, some begin anew, and some
take no such request: then it is asked from the start. What is begun anew is only of use as long as it is, to the
letter, what has been read: that part is dropped. Where it says something else, the answer stays broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from server.errors import UpstreamIncomplete
from server.upstream.attempt import AttemptFailed
from server.wire.chunks import Answerer, Chunk, ChunkSink, Delta, DeltaKind, one_by_one, split_texts, with_text

__all__ = ["Continuation", "Memory"]

# Characters that may be by chance what the answer began with ("The ", "- "); with more of them it begins anew.
_BY_CHANCE: Final = 16


class Memory:
    """Hands an answer on to ``sink`` and remembers what it said."""

    __slots__ = ("_beyond_text", "_said", "_sink", "answerer", "deltas")

    def __init__(self, sink: ChunkSink) -> None:
        self._sink = sink
        self._said: list[bytes | str] = []
        self._beyond_text = False  # it said something that is no text, or how it ends
        self.answerer = Answerer("")  # of late
        self.deltas = 0  # of content and reasoning

    @property
    def text(self) -> str:
        """The content so far; with U+FFFD where half a character was the last of it, which no request can hold."""
        text = "".join(said if isinstance(said, str) else said.decode() for said in self._said)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    @property
    def unfinished(self) -> bool:
        """Whether this is the beginning of a text that somebody else could finish."""
        return bool(self._said) and not self._beyond_text

    def begin(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self._sink.begin(answerer)

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        """The hot path."""
        self._said += texts
        self.deltas += len(texts)
        self._sink.take_texts(texts, wire)

    def take(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._remember(chunk)
        self._sink.take(chunks)

    def end(self, chunks: Sequence[Chunk]) -> None:
        self._beyond_text = True
        self._sink.end(chunks)

    def _remember(self, chunk: Chunk) -> None:
        if chunk.finish_reason is not None:
            self._beyond_text = True
        self._said += chunk.texts
        self.deltas += len(chunk.texts)
        for kind, text in chunk.deltas:
            self.deltas += 1
            if kind is DeltaKind.CONTENT:
                self._said.append(text)
            elif kind is DeltaKind.OTHER:
                self._beyond_text = True


class Continuation:
    """The rescuer's answer: hands on to ``memory`` what follows behind ``read``, the text that the client has.

    ``anew``: the rescuer was not told of that text, so that it can only begin anew. Raises AttemptFailed where what it
    says does not fit.
    """

    __slots__ = ("_anew", "_answerer", "_fits", "_held", "_memory", "_read", "_repeated")

    def __init__(self, memory: Memory, read: str, *, anew: bool) -> None:
        self._memory = memory
        self._read = read
        self._anew = anew
        self._answerer = Answerer("")
        self._repeated = ""  # what it has said, while that is how the answer began
        self._held: list[Chunk] = []  # the same, should it be by chance
        self._fits = False  # what comes now follows behind the text that was read

    def begin(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        """The hot path, once it fits."""
        if self._fits:
            self._memory.take_texts(texts, wire)
        else:
            self.take(list(split_texts(texts, wire)))

    def take(self, chunks: Sequence[Chunk]) -> None:
        if fitting := self._fit(chunks):
            self._memory.take(fitting)

    def end(self, chunks: Sequence[Chunk]) -> None:
        last = self._fit(chunks)
        if not self._fits and self._repeated:
            last = [*self._settle(), *last]  # it ends as shortly as this, or has not come as far as the one before
        elif not self._fits and self._anew:
            raise _another_answer()
        self._go_on()
        self._memory.end(last)

    def _fit(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """What of ``chunks`` is to be handed on."""
        fitting: list[Chunk] = []
        for chunk in chunks if self._fits else one_by_one(chunks):
            if self._fits:
                fitting.append(chunk)
            elif any(kind is DeltaKind.CONTENT for kind, _ in chunk.deltas):
                fitting += self._compare(chunk)
            elif chunk.finish_reason is not None or chunk.usage is not None:
                fitting.append(chunk)
            # What it thinks, or that it is the assistant, has been said before.
        return fitting

    def _compare(self, chunk: Chunk) -> list[Chunk]:
        text = "".join(text for kind, text in chunk.deltas if kind is DeltaKind.CONTENT)
        said = self._repeated + text
        if self._read.startswith(said):
            self._repeated = said
            self._held.append(chunk)
            if said == self._read:
                self._go_on()
            return []
        if said.startswith(self._read):  # its end is the first that is new
            rest = said[len(self._read) :]
            self._go_on()
            return [with_text(chunk._replace(deltas=(Delta(DeltaKind.CONTENT, rest),)), rest)]
        return [*self._settle(), chunk]

    def _settle(self) -> list[Chunk]:
        """What it said is not how the answer began, or not all of it. Then it goes on, if it can."""
        if self._anew or len(self._repeated) > _BY_CHANCE:
            raise _another_answer()
        held = self._held
        self._go_on()
        return held

    def _go_on(self) -> None:
        if not self._fits:
            self._fits = True
            self._repeated = ""
            self._held = []
            self._memory.begin(self._answerer)


def _another_answer() -> AttemptFailed:
    return AttemptFailed(UpstreamIncomplete(), "another answer than the one that broke off")
