"""Where requests go: a URL and what kind of endpoint stands there, to the bytes of a request. No I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote, urlsplit

from ops.loadtest.answers import AnswerReader, OpenAIReader, SluiceReader
from ops.loadtest.prompts import Prompt

__all__ = ["BadTarget", "Kind", "Target", "read_target"]

_SLUICE_PATH = "/api/stream"
_OPENAI_PATH = "/chat/completions"


class BadTarget(ValueError):
    """The URL is none that requests can be sent to; the text says what would be."""


class Kind(StrEnum):
    SLUICE = "sluice"  # GET /api/stream?q=…
    OPENAI = "openai"  # POST /v1/chat/completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An endpoint, and everything that its requests have in common. Its key is in no ``repr``."""

    kind: Kind
    tls: bool
    host: str
    port: int
    path: str
    model: str = ""
    max_tokens: int | None = None
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self._authority}{self.path}"

    @property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def request(self, prompt: Prompt, last_event_id: bytes = b"") -> bytes:
        """The bytes of a request: a question, or with ``last_event_id`` for the rest of its answer."""
        headers = [f"Host: {self._authority}", "User-Agent: sluice-loadtest", "Accept: text/event-stream"]
        headers.append("Accept-Encoding: identity")  # a compressor holds tokens back
        if self.api_key:
            headers.append(f"Authorization: Bearer {self.api_key}")
        if last_event_id:
            headers.append(f"Last-Event-ID: {last_event_id.decode('latin-1')}")
        body = b""
        if self.kind is Kind.SLUICE:
            start = f"GET {self.path}?q={quote(prompt.text, safe='')} HTTP/1.1"
        else:
            start = f"POST {self.path} HTTP/1.1"
            body = self._body(prompt)
            headers += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([start, *headers, "", ""]).encode("latin-1") + body

    def reader(self) -> AnswerReader:
        """What reads one answer."""
        return SluiceReader() if self.kind is Kind.SLUICE else OpenAIReader()

    def _body(self, prompt: Prompt) -> bytes:
        asked = {
            "model": self.model,
            "messages": prompt.as_messages(),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            asked["max_tokens"] = self.max_tokens
        return json.dumps(asked).encode("ascii")


def read_target(url: str, kind: str | None) -> Target:
    """The endpoint that a URL means; ``kind`` where the URL is not to decide it. Raises BadTarget.

    A path that ends in ``/v1`` or ``/chat/completions`` is OpenAI's, any other is where a Sluice stands.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except (ValueError, UnicodeError) as exc:
        raise BadTarget(f"{url!r} is no URL: {exc}") from exc
    if parts.username is not None or parts.password is not None:
        raise BadTarget("the URL holds credentials; give a key with --api-key-file or LOADTEST_API_KEY")
    if parts.scheme not in ("http", "https") or not host:
        raise BadTarget(f"{url!r} is no URL to ask; one is http://HOST:PORT or https://HOST, with a path or without")
    if parts.query or parts.fragment:
        raise BadTarget(f"{url!r} has a query or a fragment; the prompts come from --prompts")
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    tls = parts.scheme == "https"
    chosen = Kind(kind) if kind else Kind.OPENAI if path.endswith(("/v1", _OPENAI_PATH)) else Kind.SLUICE
    return Target(kind=chosen, tls=tls, host=host, port=port or (443 if tls else 80), path=_whole_path(path, chosen))


def _whole_path(path: str, kind: Kind) -> str:
    if kind is Kind.SLUICE:
        return path if path.endswith(_SLUICE_PATH) else path + _SLUICE_PATH
    if path.endswith(_OPENAI_PATH):
        return path
    return (path or "/v1") + _OPENAI_PATH
