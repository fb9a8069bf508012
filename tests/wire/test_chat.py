"""The request to the upstream."""

from __future__ import annotations

import json

from server.wire.chat import ChatRequest, encode_chat_request


def test_the_request_is_streamed_bounded_and_asks_for_usage() -> None:
    request = ChatRequest(messages=(("system", "be brief"), ("user", "why? \u2028 😀")), max_tokens=8, temperature=0.5)
    assert json.loads(encode_chat_request(request, "m")) == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why? \u2028 😀"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8,
        "temperature": 0.5,
    }
