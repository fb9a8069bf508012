"""What is asked of an upstream: the body of ``POST /chat/completions``."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

__all__ = ["ChatRequest", "encode_chat_request"]

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered. ``messages`` are (role, content) pairs, oldest first."""

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float


def encode_chat_request(request: ChatRequest, model: str) -> bytes:
    """The request's body, always streamed and with the usage that some endpoints give only when asked."""
    return _encoder.encode(
        {
            "model": model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
    )
