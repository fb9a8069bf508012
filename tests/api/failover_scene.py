"""A server before endpoints of which some fail: how it is asked on each of its faces, and what holds however it ends.

Each endpoint has words, a model, a usage and a key of its own, so an answer tells whose it is. It shares nothing with
server/wire: what it reads is judged by the contract's sections 3 and 5, not by our own parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import pytest

from server.logs import JsonFormatter
from tests.api.observing import until
from tests.api.raw_client import RawClient, Response, post
from tests.conftest import InProcess, Serve
from tests.sse_client import Answer, ask
from tests.upstream.conftest import check_answer
from tests.upstream_sim import Call, Script, ScriptedUpstream, chunk

__all__ = [
    "FACES",
    "FIRST",
    "SECOND",
    "THIRD",
    "Outcome",
    "Scene",
    "Voice",
    "healthy",
    "in_turn",
    "mumbling",
    "opening",
    "plain_body",
    "posted",
    "refusing",
    "resetting",
    "silent",
    "speak",
    "voice_of",
    "wants_stream",
]

# GET /api/stream; POST /v1/chat/completions with "stream" true; and false.
FACES: Final = ("browser", "stream", "plain")

ECHO: Final = "canary-sk-ab***yz"  # stands in what an endpoint says of our key, and may go no further
QUESTION: Final = "hi"
CLIENTS_KEY: Final = "sk-of-the-client"  # no endpoint may ever see it


class Voice(NamedTuple):
    """What one endpoint says, and what it is called."""

    model: str
    key: str
    words: tuple[str, ...]
    usage: tuple[int, int]  # prompt and completion tokens

    @property
    def text(self) -> str:
        return "".join(self.words)


def _voice(name: str, usage: tuple[int, int]) -> Voice:
    return Voice(f"{name}-model", f"sk-of-the-{name}", tuple(f"{name}{number} " for number in range(1, 13)), usage)


FIRST: Final = _voice("first", (11, 12))
SECOND: Final = _voice("second", (21, 22))
THIRD: Final = _voice("third", (31, 32))
VOICES: Final = {voice.model: voice for voice in (FIRST, SECOND, THIRD)}

# ---- Scripts: an endpoint that does as it is asked, streamed or not, and its failures


def voice_of(call: Call) -> Voice:
    """Whose endpoint was asked, as the request says."""
    return VOICES[call.json["model"]]


def wants_stream(call: Call) -> bool:
    return bool(call.json.get("stream"))


def _usage(voice: Voice) -> dict[str, Any]:
    prompt, completion = voice.usage
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def plain_body(voice: Voice, finish: str = "stop") -> bytes:
    """A whole answer that is not streamed."""
    message = {"role": "assistant", "content": voice.text}
    return json.dumps(
        {
            "id": "c-1",
            "object": "chat.completion",
            "created": 1,
            "model": voice.model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": _usage(voice),
        }
    ).encode()


async def opening(call: Call, words: int) -> None:
    """The head of a stream, and the first so many words of its answer."""
    voice = voice_of(call)
    await call.head()
    await call.event(chunk({"role": "assistant", "content": ""}, model=voice.model))
    for word in voice.words[:words]:
        await call.event(chunk({"content": word}, model=voice.model))


async def speak(call: Call, *, words_sent: int = 0, finish: str = "stop", done: bool = True) -> None:
    """The rest of a streamed answer of which so many words have been sent."""
    voice = voice_of(call)
    for word in voice.words[words_sent:]:
        await call.event(chunk({"content": word}, model=voice.model))
    await call.event(chunk({}, finish, model=voice.model))
    if (call.json.get("stream_options") or {}).get("include_usage"):
        await call.event(chunk(model=voice.model, usage=_usage(voice)))
    if done:
        await call.done()


async def healthy(call: Call) -> None:
    """The whole answer, in the form that was asked for."""
    if wants_stream(call):
        await opening(call, 0)
        await speak(call)
    else:
        body = plain_body(voice_of(call))
        await call.head(200, "application/json", Content_Length=str(len(body)))
        await call.write(body)
        await call.end()


def refusing(status: int, code: str | None = None, **headers: str) -> Script:
    """That status for ever, with an error object that quotes what it should not."""
    error = {"message": f"Refused: {ECHO}", "type": "invalid_request_error", "param": None, "code": code}

    async def script(call: Call) -> None:
        await call.refuse(status, error, **headers)

    return script


async def resetting(call: Call) -> None:
    """RST before any byte of an answer."""
    if call.open:
        call.reset()


def mumbling(sign: str, words: int) -> Script:
    """So many words, and then ``role``, ``empty`` or ``comment`` again and again, or ``nothing``; a plain answer stops
    after its head."""

    async def script(call: Call) -> None:
        if not wants_stream(call):
            await call.head(200, "application/json")
            await call.gone()
            return
        model = voice_of(call).model
        await call.head()
        for word in voice_of(call).words[:words]:
            await call.event(chunk({"content": word}, model=model))
        while call.open:
            match sign:
                case "role":
                    await call.event(chunk({"role": "assistant", "content": ""}, model=model))
                case "empty":
                    await call.event(chunk({}, model=model))
                case "comment":
                    await call.write(b": still thinking\n\n")
            await asyncio.sleep(0.05)

    return script


async def silent(call: Call) -> None:
    """Not a byte, for as long as it is let."""
    await call.gone()


def in_turn(*scripts: Script) -> Script:
    """Each call gets the next script, and the last one for ever."""
    left = list(scripts)

    async def script(call: Call) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(call)

    return script


# ---- What a client got


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One answer or refusal, the same for every face."""

    face: str
    status: int
    raw: bytes
    seconds: float
    response: Response | None = None  # of an OpenAI face
    text: str = ""
    models: set[str] = field(default_factory=set)  # as whatever names one names it
    usages: list[tuple[int | None, int | None]] = field(default_factory=list)
    finish_reason: str | None = None
    error: dict[str, Any] | None = None  # in-band or as the refusal's body; a browser's {"error": CODE, …} whole
    complete: bool = False  # [DONE] in a stream, a 200 of a plain answer

    @property
    def code(self) -> Any:
        if self.error is None:
            return None
        return self.error["error"] if self.face == "browser" else self.error["code"]

    @property
    def in_band(self) -> bool:
        """Whether it failed after its status line."""
        return self.status == 200 and self.error is not None

    @property
    def refused(self) -> bool:
        """Whether the status said that it failed."""
        return self.status != 200

    def is_from(self, voice: Voice) -> bool:
        """Whether it is that endpoint's whole answer."""
        return self.complete and self.text == voice.text


def posted(face: str, **fields: Any) -> bytes:
    """A client's request to an OpenAI face."""
    body: dict[str, Any] = {
        "model": FIRST.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": face == "stream",
    }
    if face == "stream":
        body["stream_options"] = {"include_usage": True}
    return post(
        json.dumps(body | fields).encode(), f"Authorization: Bearer {CLIENTS_KEY}", target="/v1/chat/completions"
    )


def _data_of(body: bytes) -> list[bytes]:
    """The data of each block. In silence a comment line with one newline may stand between blocks; nothing else may."""
    found = []
    while body:
        line, newline, body = body.partition(b"\n")
        if line.startswith(b":"):
            assert newline, "a comment has its newline"
            assert not body.startswith(b"\n"), "a blank line after a comment breaks openai-python"
            continue
        assert line.startswith(b"data: "), f"nothing but data: {line!r}"
        assert newline
        assert body.startswith(b"\n"), f"each line of data is a block of its own: {line!r}"
        body = body[1:]
        found.append(line[6:])
    return found


def _check_error(error: Any) -> None:
    """OpenAI's error object."""
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]


def _read_usage(outcome: Outcome, usage: Any) -> None:
    if usage is not None:
        outcome.usages.append((usage["prompt_tokens"], usage["completion_tokens"]))


def _read_stream(outcome: Outcome) -> None:
    *blocks, last = _data_of(outcome.raw)
    if last == b"[DONE]":
        outcome.complete = True
    else:
        outcome.error = json.loads(last)["error"]
        _check_error(outcome.error)
    for block in blocks:
        value = json.loads(block)  # neither [DONE] nor anything malformed, but at the end
        assert "error" not in value, "an error is the last block"
        outcome.models.add(value["model"])
        _read_usage(outcome, value.get("usage"))
        for choice in value["choices"]:
            outcome.text += choice["delta"].get("content") or ""
            outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason


def _read_plain(outcome: Outcome) -> None:
    value = json.loads(outcome.raw)
    assert "error" not in value, "a 200 is an answer"
    assert value["object"] == "chat.completion"
    (choice,) = value["choices"]
    outcome.models.add(value["model"])
    outcome.text = choice["message"]["content"]
    outcome.finish_reason = choice["finish_reason"]
    _read_usage(outcome, value.get("usage"))
    outcome.complete = True


def _read_openai(face: str, response: Response, seconds: float) -> Outcome:
    assert response.complete, "the response has the end that its framing promises"
    outcome = Outcome(face=face, status=response.status, raw=response.body, seconds=seconds, response=response)
    if response.status != 200:
        assert response.headers["Content-Type"].startswith("application/json")
        value = response.json
        assert set(value) == {"error"}
        outcome.error = value["error"]
        _check_error(outcome.error)
    elif face == "stream":
        assert response.headers["Content-Type"].startswith("text/event-stream")
        _read_stream(outcome)
    else:
        assert response.headers["Content-Type"].startswith("application/json")
        _read_plain(outcome)
    return outcome


def _read_browser(answer: Answer, seconds: float) -> Outcome:
    check_answer(answer)
    outcome = Outcome(
        face="browser", status=answer.status, raw=bytes(answer.raw), seconds=seconds, text=answer.text,
        error=answer.error, complete=answer.complete,
    )  # fmt: skip
    if usage := answer.usage:
        outcome.models.add(usage["model"])
        outcome.usages.append((usage["prompt_tokens"], usage["completion_tokens"]))
        outcome.finish_reason = usage["finish_reason"]
        assert usage["tokens"] == len(answer.tokens)
    return outcome


def _check(outcome: Outcome) -> None:
    """The verdict that holds for every scenario: one endpoint's answer, whole or told to be cut; and no secret."""
    assert outcome.complete is (outcome.error is None), "an end or an error, and never both"
    speakers = [voice for voice in VOICES.values() if outcome.text and voice.text.startswith(outcome.text)]
    if outcome.text:
        assert len(speakers) == 1, f"the words of one endpoint, from its first one on: {outcome.text!r}"
        assert outcome.models <= {speakers[0].model}, "the model that really answered"
        assert set(outcome.usages) <= {speakers[0].usage}
        assert len(outcome.usages) <= 1, "one answer has one usage"
    if outcome.complete:
        assert outcome.text == speakers[0].text, "a truncated answer never looks complete"
        assert outcome.models == {speakers[0].model}
        assert outcome.usages == [speakers[0].usage]
    for voice in VOICES.values():
        assert voice.key.encode() not in outcome.raw
    for secret in ("127.0.0.1", "Traceback", CLIENTS_KEY):
        assert secret.encode() not in outcome.raw


# ---- The scene


class Scene:
    """Up to three endpoints in their order, the server before them, and its clients."""

    def __init__(
        self,
        serve: Serve,
        upstreams: tuple[ScriptedUpstream, ScriptedUpstream, ScriptedUpstream],
        caplog: pytest.LogCaptureFixture,
        fast_path: str,
    ) -> None:
        self.first, self.second, self.third = self.upstreams = upstreams
        self._serve = serve
        self._caplog = caplog
        self._fast_path = fast_path
        self.server: InProcess | None = None
        self.serves_afterwards = True  # a test in which every circuit opens says that it is otherwise

    async def open(self, *scripts: Script | None, **environment: str) -> InProcess:
        """Open the server before endpoints that behave so; None is one that is not configured. Unless a second script
        says otherwise, there is one fallback, and it is well."""
        others: tuple[Script | None, ...] = (healthy, None)
        first, second, third = (*scripts, *others[len(scripts) - 1 :])
        assert first is not None
        self.first.script = first
        fallbacks = []
        for upstream, voice, script in ((self.second, SECOND, second), (self.third, THIRD, third)):
            if script is not None:
                upstream.script = script
                fallbacks.append({"base_url": upstream.base_url, "api_key": voice.key, "model": voice.model})
        settings = {
            "LLM_API_KEY": FIRST.key,
            "LLM_MODEL": FIRST.model,
            "SLUICE_FALLBACKS": json.dumps(fallbacks),
            "SLUICE_RATE_LIMIT": "off",
            "SLUICE_MAX_STREAMS_PER_CLIENT": "1000",
            "SLUICE_FAST_PATH": self._fast_path,
        }
        self.server = await self._serve(**settings | environment)
        return self.server

    async def connect(self) -> RawClient:
        assert self.server is not None
        return await RawClient.connect(self.server.port)

    async def ask(self, face: str, **fields: Any) -> Outcome:
        """Ask on that face, and judge what comes; ``fields`` go into the body of an OpenAI request."""
        assert self.server is not None
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        if face == "browser":
            answer = await ask(self.server.url, QUESTION)
            outcome = _read_browser(answer, loop.time() - began_at)
        else:
            async with await self.connect() as client:
                response = await client.ask(posted(face, **fields))
            outcome = _read_openai(face, response, loop.time() - began_at)
        _check(outcome)
        print(
            f"{face}: {outcome.status} {'complete' if outcome.complete else outcome.code} "
            f"in {outcome.seconds:.2f} s, asked {[len(upstream.calls) for upstream in self.upstreams]}"
        )
        return outcome

    async def check_aftermath(self) -> None:
        """Whatever happened: nothing runs on, nothing secret was logged, and the next question is answered."""
        assert self.server is not None
        desk = self.server.desk
        with contextlib.suppress(TimeoutError):
            await until(lambda: not (desk.streams or desk.viewers or self._open_calls), within=3)
        assert desk.streams == 0, "an answer still holds its place"
        assert desk.viewers == 0, "a viewer that left is still counted"
        assert self._open_calls == [], "an endpoint still works for nobody"
        for upstream in self.upstreams:
            for call in upstream.calls:
                if call.error is not None:
                    raise call.error
            upstream.script = healthy
        if self.serves_afterwards:
            for face in FACES:
                outcome = await self.ask(face)
                assert outcome.complete, f"the server is alive on its face {face}"
                assert outcome.seconds < 5
        for record in self._caplog.get_records("call") + self._caplog.get_records("teardown"):
            line = JsonFormatter().format(record)
            assert record.levelno < logging.ERROR, line
            for secret in (*(voice.key for voice in VOICES.values()), ECHO, CLIENTS_KEY):
                assert secret not in line

    @property
    def _open_calls(self) -> list[Call]:
        return [call for upstream in self.upstreams for call in upstream.open_calls]
