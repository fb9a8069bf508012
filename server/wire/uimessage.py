"""The AI SDK's chat (contract, section 6): its messages to a conversation, an answer to its UI message stream, v1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from server.errors import InvalidRequest, RelayError
from server.wire.chat import MAX_MESSAGES, Content, check_text, invalid_body, mend_surrogates
from server.wire.chunks import DONE, Answerer, Chunk, DeltaKind, encode_json
from server.wire.events import Summary
from server.wire.sse import PING_COMMENT, encode_event

__all__ = ["UIChat", "UIMessageEncoder", "decode_ui_chat"]

_MAX_ID: Final = 200  # characters of a chat's id

_DONE: Final = encode_event(DONE)


# ---- What is asked


class _Part(msgspec.Struct, frozen=True):
    """A part of a message. What it holds beyond this (state, ids, metadata) is the page's own."""

    type: str
    text: str = ""
    url: str = ""
    media_type: str = msgspec.field(default="", name="mediaType")


class _Message(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    parts: tuple[_Part, ...]


class UIChat(msgspec.Struct, frozen=True):
    """The body of ``POST /api/chat``. An app may add fields of its own."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_ID)]
    messages: Annotated[tuple[_Message, ...], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]

    def conversation(self, *, max_chars: int) -> tuple[tuple[str, Content], ...]:
        """The (role, content) pairs to be answered. Raises InvalidRequest where the model could not see all of it.

        A message of the assistant's that holds no text (it failed, or only thought) is no turn of the conversation.
        ``max_chars`` bounds what others wrote: an answer of ours that was longer would lock its chat for ever.
        """
        turns: list[tuple[str, Content]] = []
        for place, message in enumerate(self.messages):
            where = f"messages[{place}]"
            text = "".join(part.text for part in message.parts if part.type == "text")
            files = [_read_file(where, part) for part in message.parts if part.type == "file"]
            if message.role == "assistant" and not text:
                continue
            ours = message.role == "assistant"
            may_be_blank = message.role != "user" or bool(files)
            check_text(where, text, max_chars=len(text) if ours else max_chars, may_be_blank=may_be_blank)
            if files and message.role == "user":
                turns.append((message.role, [*files, *([{"type": "text", "text": text}] if text else [])]))
            else:
                turns.append((message.role, text))
        if not turns:
            raise InvalidRequest("invalid_request", "The chat holds no message that could be answered.")
        return tuple(turns)


_posted = msgspec.json.Decoder(UIChat)


def decode_ui_chat(body: bytes) -> UIChat:
    """What a chat posted. Raises InvalidRequest."""
    try:
        return _posted.decode(mend_surrogates(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid_body(exc, body) from None


def _read_file(where: str, part: _Part) -> dict[str, Any]:
    if not part.media_type.startswith("image/") or not part.url.startswith(("data:image/", "https://")):
        raise InvalidRequest(
            "invalid_request", f"{where} has a file that is not an image by data: or https: URL; no other can be sent."
        )
    return {"type": "image_url", "image_url": {"url": part.url}}


# ---- What is answered

_PARTS: Final = {DeltaKind.CONTENT: b"text", DeltaKind.REASONING: b"reasoning"}


class UIMessageEncoder:
    """Encodes an answer as the parts of one message, whose id is the same however often it is read.

    Only the keys that a part must have: version 5.0.0 takes no other. Text and reasoning may take turns; each turn is a
    part of its own.
    """

    __slots__ = ("_message_id", "_open", "_parts")

    def __init__(self, message_id: str) -> None:
        self._message_id = message_id
        self._open: DeltaKind | None = None  # the kind of the part that is open
        self._parts = 0  # begun so far; a part's id is its number

    def start(self, number: int, model: str) -> Sequence[bytes]:
        start = b'{"type":"start","messageId":%b}' % encode_json(self._message_id)
        return [encode_event(start), encode_event(b'{"type":"start-step"}')]

    def begin(self, answerer: Answerer) -> None: ...

    def tokens(self, number: int, texts: Sequence[bytes], wire: bytes) -> Sequence[bytes]:
        """As ``ChunkSink.take_texts``. The hot path."""
        events = self._turn_to(DeltaKind.CONTENT)
        template = b'data: {"type":"text-delta","id":"%d","delta":"%%b"}\n\n' % self._parts
        return [*events, *(template % text for text in texts)]

    def chunk(self, number: int, chunk: Chunk) -> Sequence[bytes]:
        events: list[bytes] = []
        for kind, text in chunk.deltas:
            if (name := _PARTS.get(kind)) is not None:
                events += self._turn_to(kind)
                events.append(
                    encode_event(b'{"type":"%b-delta","id":"%d","delta":%b}' % (name, self._parts, encode_json(text)))
                )
        return events

    def complete(self, number: int, summary: Summary) -> Sequence[bytes]:
        return [
            *self._turn_to(None),
            encode_event(b'{"type":"finish-step"}'),
            encode_event(b'{"type":"finish"}'),
            _DONE,
        ]

    def stopped(self, number: int, summary: Summary) -> Sequence[bytes]:
        return [*self._turn_to(None), encode_event(b'{"type":"abort"}'), _DONE]

    def failed(self, number: int, error: RelayError) -> Sequence[bytes]:
        """No ``[DONE]``: what was cut never looks complete."""
        return [encode_event(b'{"type":"error","errorText":%b}' % encode_json(str(error)))]

    def ping(self, retry_ms: int | None = None) -> bytes:
        return PING_COMMENT

    def _turn_to(self, kind: DeltaKind | None) -> list[bytes]:
        """End the part that is open and begin one of ``kind``, unless it is that one."""
        if kind is self._open:
            return []
        events = []
        if self._open is not None:
            events.append(encode_event(b'{"type":"%b-end","id":"%d"}' % (_PARTS[self._open], self._parts)))
        if kind is not None:
            self._parts += 1
            events.append(encode_event(b'{"type":"%b-start","id":"%d"}' % (_PARTS[kind], self._parts)))
        self._open = kind
        return events
