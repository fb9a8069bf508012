"""Conversations to be answered: as a client posts them to us, and as an upstream is asked."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from server.errors import InvalidRequest

__all__ = [
    "MAX_MESSAGES",
    "ChatRequest",
    "Content",
    "PostedChat",
    "PostedMessage",
    "check_text",
    "decode_posted_chat",
    "invalid_body",
    "invalid_request",
    "mend_surrogates",
]

MAX_MESSAGES: Final = 1000  # of one conversation; a body of 1 MiB could hold 30,000
_MAX_ECHO: Final = 200  # characters of a client's own words in what it is told

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# An escape in JSON; the group is there where it is half a pair without its other half.
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)

_encoder = msgspec.json.Encoder()


# ---- From a client


class PostedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class PostedChat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /api/streams`` (contract, section 4). What is null or absent is the server's to choose."""

    messages: Annotated[tuple[PostedMessage, ...], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    model: str | None = None


_posted = msgspec.json.Decoder(PostedChat)


def decode_posted_chat(body: bytes, *, max_chars: int) -> PostedChat:
    """What a client posted. Raises InvalidRequest, naming the field, for what is not exactly of that shape: a request
    that was misread costs as much as one that was understood.

    ``max_chars`` bounds one message, in code points.
    """
    try:
        chat = _posted.decode(body)
        # What has passed is at most three levels deep, so this cannot exhaust the stack.
        json.loads(body, object_pairs_hook=_refuse_twice)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid_body(exc, body) from None
    for place, message in enumerate(chat.messages):
        check_text(
            f"messages[{place}].content", message.content, max_chars=max_chars, may_be_blank=message.role != "user"
        )
    return chat


def check_text(where: str, text: str, *, max_chars: int, may_be_blank: bool) -> None:
    """Return if ``text`` may stand in a conversation. Raises InvalidRequest, which says ``where`` it does not."""
    if len(text) > max_chars:
        raise invalid_request(f"{where} has {len(text)} characters; it may have at most {max_chars}")
    if "\0" in text:
        raise invalid_request(f"{where} holds a NUL character")
    if not may_be_blank and not text.strip():
        raise invalid_request(f"{where} is empty")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    """An object in which a name stands twice means different things to different readers (RFC 8259 §4)."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise invalid_request(f"the field {name} is given more than once")


def mend_surrogates(body: bytes) -> bytes:
    """JSON with U+FFFD in place of each escaped half of a surrogate pair: a page that cuts a text between the two sends
    one, and no UTF-8 can carry it on."""
    if _SURROGATE.search(body) is None:  # which nearly all bodies are spared, whatever else they escape
        return body
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], body)


def invalid_body(exc: Exception, body: bytes) -> InvalidRequest:
    """What is wrong with a body that msgspec did not take, in our words."""
    return invalid_request(_in_our_words(exc, body))


def _in_our_words(exc: Exception, body: bytes) -> str:
    if isinstance(exc, msgspec.ValidationError):
        return str(exc).replace("`$.", "`").replace("`", "")
    # Python writes NaN and Infinity where JSON has no word for them; who sent one is helped by its name.
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    for name, number in value.items() if isinstance(value, dict) else ():
        if isinstance(number, float) and not math.isfinite(number):
            return f"the field {name} is not a number"
    return "it is not JSON in UTF-8"


def invalid_request(reason: str, *, param: str | None = None) -> InvalidRequest:
    """What is wrong with a body, and with which of its fields."""
    shown = "".join(character if character.isprintable() else "?" for character in reason[:_MAX_ECHO])
    return InvalidRequest("invalid_request", f"The request's body is not what this takes: {shown}.", param=param)


# ---- To an upstream


Content = str | list[dict[str, Any]]  # a text, or OpenAI's content parts


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation to be answered in our own words. ``messages`` are (role, content) pairs, oldest first; ``model``
    is the one that was named, None where that was left to the server."""

    messages: tuple[tuple[str, Content], ...]
    max_tokens: int
    temperature: float
    model: str | None = None

    streamed: ClassVar[bool] = True
    verbatim: ClassVar[bool] = False

    def continued(self, said: str, spent: int) -> ChatRequest:
        """The same, with the answer ``said`` so far, at the cost of ``spent`` LLM tokens, for its last message."""
        messages = (*self.messages, ("assistant", said))
        return msgspec.structs.replace(self, messages=messages, max_tokens=max(1, self.max_tokens - spent))

    @property
    def prompt(self) -> str:
        """The last message."""
        content = self.messages[-1][1]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    def encode(self, model: str) -> bytes:
        """The request's body, always streamed and with the usage that some endpoints give only when asked."""
        return _encoder.encode(
            {
                "model": model,
                "messages": [{"role": role, "content": content} for role, content in self.messages],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
            }
        )
