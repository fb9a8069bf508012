"""An answer that broke off, finished by another: what its client reads is one text, with nothing twice and no gap."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.upstream.attempt import AttemptFailed
from server.upstream.rescue import Continuation, Memory
from server.wire.chunks import Answerer, Chunk, Delta, DeltaKind, Usage
from tests.upstream.recording import Recording

TEXT = "The answer is forty-two, and the question is not known."
BROKEN_AT = 24
READ, REST = TEXT[:BROKEN_AT], TEXT[BROKEN_AT:]

ROLE = Chunk(wire=b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n')
STOP = Chunk(finish_reason="stop", wire=b"data: stop\n\n")


def said(text: str, kind: DeltaKind = DeltaKind.CONTENT) -> Chunk:
    wire = b"data: %b\n\n" % json.dumps({"id": 1, "choices": [{"index": 0, "delta": {"content": text}}]}).encode()
    return Chunk((Delta(kind, text),), wire=wire)


def pieces(text: str, size: int) -> list[Chunk]:
    return [said(text[at : at + size]) for at in range(0, len(text), size)]


class Rescue:
    """A client that has read ``READ``, and the continuation of its answer."""

    def __init__(self, read: str = READ, *, anew: bool = False) -> None:
        self.client = Recording()
        self.memory = Memory(self.client)
        self.memory.begin(Answerer("first", None, "primary"))
        if read:
            self.memory.take([said(read)])
        self.continuation = Continuation(self.memory, self.memory.text, anew=anew)
        self.continuation.begin(Answerer("second", None, "fallback_1"))

    def hear(self, *chunks: Chunk, last: Sequence[Chunk] = (STOP,)) -> str:
        """Everything that the client has read in the end."""
        for chunk in chunks:
            self.continuation.take([chunk])
        self.continuation.end(last)
        assert self.client.done == 1
        return "".join(self.client.texts)

    @property
    def wire(self) -> str:
        """The same, as those who get the chunks as they came read it."""
        wires = [chunk.wire.removeprefix(b"data: ") for chunk in self.client.chunks if chunk.deltas]
        return "".join(json.loads(wire)["choices"][0]["delta"]["content"] for wire in wires)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_who_goes_on_is_handed_on(size: int) -> None:
    rescue = Rescue()
    assert rescue.hear(ROLE, *pieces(REST, size)) == TEXT
    assert rescue.wire == TEXT
    assert rescue.client.answerer == Answerer("second", None, "fallback_1")


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("size", [1, 5, 7, 100])
def test_who_begins_anew_with_the_same_words_is_handed_on_behind_them(size: int, anew: bool) -> None:
    """Also where one delta holds the last that was read and the first that was not."""
    rescue = Rescue(anew=anew)
    assert rescue.hear(ROLE, *pieces(TEXT, size)) == TEXT
    assert rescue.wire == TEXT


@pytest.mark.parametrize("size", [1, 5, 100])
def test_who_was_not_told_and_says_something_else_is_refused(size: int) -> None:
    """To go on with it would be another answer's end behind this one's beginning."""
    rescue = Rescue(anew=True)
    with pytest.raises(AttemptFailed):
        rescue.hear(*pieces("Forty-two.", size))
    assert "".join(rescue.client.texts) == READ
    assert rescue.client.answerer == Answerer("first", None, "primary"), "it has not answered"


def test_who_begins_anew_and_then_says_something_else_is_refused() -> None:
    rescue = Rescue()
    with pytest.raises(AttemptFailed):
        rescue.hear(*pieces(TEXT[:20] + "another number.", 5))
    assert "".join(rescue.client.texts) == READ


def test_what_repeats_the_beginning_by_chance_is_no_new_beginning() -> None:
    """A list goes on with the "- " that it began with."""
    rescue = Rescue("- one\n- two\n")
    assert rescue.hear(*pieces("- three\n- four", 1)) == "- one\n- two\n- three\n- four"
    assert rescue.wire == "- one\n- two\n- three\n- four"


def test_a_rescuer_with_nothing_to_add_ends_the_answer() -> None:
    assert Rescue(TEXT).hear(ROLE) == TEXT


@pytest.mark.parametrize("chunks", [[], [said("The answer")]], ids=["nothing", "less"])
def test_who_begins_anew_and_does_not_come_as_far_is_refused(chunks: list[Chunk]) -> None:
    with pytest.raises(AttemptFailed):
        Rescue(anew=True).hear(*chunks)


def test_what_the_rescuer_thinks_is_not_told_behind_the_answer() -> None:
    rescue = Rescue()
    assert rescue.hear(said("hm", DeltaKind.REASONING), said(REST)) == TEXT


def test_its_usage_and_its_reason_to_finish_are_the_answers() -> None:
    rescue = Rescue()
    rescue.hear(said(REST), STOP, last=[Chunk(usage=Usage(3, 7))])
    assert [chunk.finish_reason for chunk in rescue.client.chunks if chunk.finish_reason] == ["stop"]
    assert [chunk.usage for chunk in rescue.client.chunks if chunk.usage] == [Usage(3, 7)]


def test_it_goes_by_the_hot_path_too() -> None:
    rescue = Rescue()
    rescue.continuation.take([said(REST[:1])])
    rescue.continuation.take_texts([text.encode() for text in REST[1:]], b"x" * len(REST[1:]))
    assert rescue.hear() == TEXT
    assert rescue.memory.text == TEXT


@pytest.mark.parametrize("anew", [True, False])
def test_runs_of_tokens_are_compared_one_by_one(anew: bool) -> None:
    """A read may bring many at once, the last that was read and the first that was not among them."""
    rescue = Rescue(anew=anew)
    words = [TEXT[at : at + 5] for at in range(0, len(TEXT), 5)]
    run = Chunk(texts=[word.encode() for word in words], wire=b"".join(said(word).wire for word in words))
    rescue.continuation.take([ROLE, run])
    rescue.continuation.end([STOP])
    assert "".join(rescue.client.texts) == rescue.memory.text == TEXT


@pytest.mark.parametrize(
    ("chunks", "unfinished"),
    [
        ([], False),
        ([Chunk((Delta(DeltaKind.REASONING, "hm"),))], False),
        ([said("a")], True),
        ([said("a"), Chunk((Delta(DeltaKind.OTHER, ""),))], False),
        ([said("a"), STOP], False),
    ],
    ids=["nothing", "a thought", "text", "a tool call", "its end"],
)
def test_only_a_text_can_be_finished_by_another(chunks: list[Chunk], unfinished: bool) -> None:
    memory = Memory(Recording())
    memory.take(chunks)
    assert memory.unfinished is unfinished


def test_halves_of_a_character_are_one_and_half_of_one_is_none() -> None:
    """The text goes into a request, and no UTF-8 can hold a half."""
    memory = Memory(Recording())
    memory.take([said("a\ud83d"), said("\ude00b\ud83d")])
    assert memory.text == "a😀b\ufffd"


@given(
    st.text(alphabet="ab ", min_size=1, max_size=60),
    st.integers(1, 60),
    st.lists(st.integers(1, 9), max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_however_it_comes_the_text_is_the_whole_or_what_was_read(
    text: str, broken_at: int, sizes: list[int], repeats: bool, anew: bool
) -> None:
    """A rescuer of the same text, that begins anew or goes on: its client reads all of it, or no more than before."""
    read = text[:broken_at]
    rescue = Rescue(read, anew=anew)
    coming = text if repeats or anew else text[len(read) :]
    chunks = []
    for size in [*sizes, *[len(coming)] * bool(coming)]:
        if coming:
            chunks.append(said(coming[:size]))
            coming = coming[size:]
    try:
        whole = rescue.hear(*chunks)
    except AttemptFailed:
        assert "".join(rescue.client.texts) == read
    else:
        # A rest that begins with all that was read cannot be told from a new beginning.
        assert whole == text or (not (repeats or anew) and text[len(read) :].startswith(read))
    assert rescue.wire == "".join(rescue.client.texts)
