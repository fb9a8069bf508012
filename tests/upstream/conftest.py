"""The server before an upstream that misbehaves, and what must be true after each of its faults."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from server.logs import JsonFormatter
from tests.conftest import InProcess, Serve
from tests.sse_client import Answer, ask
from tests.upstream_sim import Call, Script, ScriptedUpstream

__all__ = ["ECHO", "KEY", "QUESTION", "RETRYABLE", "Relay", "check_answer", "until"]

KEY = "sk-canary-0451"  # ours; the upstream gets it, and nobody else may
ECHO = "canary-sk-ab***yz"  # stands in what the upstream says in an error, and may go no further
QUESTION = "a canary question"

# The codes of the contract's section 3 that an upstream can cause, and whether asking again can help.
RETRYABLE = {
    "upstream_unreachable": True,
    "upstream_timeout": True,
    "upstream_rate_limited": True,
    "upstream_rejected": False,
    "upstream_error": True,
    "upstream_invalid": False,
    "upstream_incomplete": True,
    "stream_timeout": True,
    "answer_too_large": False,
}


async def until(condition: Callable[[], bool], *, within: float = 2.0) -> bool:
    """Whether ``condition`` comes true within so many seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while not condition():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def check_answer(answer: Answer) -> None:
    """What holds for every answer, whatever the upstream did (contract, section 3)."""
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"

    numbered = [event for event in answer.events if event.id]
    assert [event.number for event in numbered] == list(range(len(numbered))), "ids rise by one from 0"
    assert len({event.id.rpartition(".")[0] for event in numbered}) == 1, "of one stream"
    assert all(event.type == "ping" for event in answer.events if not event.id), "only a heartbeat has no id"
    assert answer.events[0].type == "start"

    last = answer.events[-1]
    ends = [
        event
        for event in answer.events
        if event.data == "[DONE]" or (event.type == "message" and "error" in event.json)
    ]
    assert ends == [last], "one end, and nothing behind it"
    if answer.complete:
        assert answer.events[-2].type == "usage"
    else:
        assert set(answer.error) == {"error", "message", "retryable"}
        assert answer.error["retryable"] is RETRYABLE[answer.error["error"]]
        assert answer.usage is None
    for secret in (KEY, ECHO, "/v1", "127.0.0.1", "Traceback"):
        assert secret.encode() not in answer.raw, "nothing of the upstream's but the answer"


class Relay:
    """Asks the server, opened at the first question, and remembers what it left running at the upstream."""

    def __init__(
        self, serve: Serve, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture, fast_path: str
    ) -> None:
        self.upstream = upstream
        self._fast_path = fast_path
        self.server: InProcess | None = None
        self.running = 0  # scripts; one that leaves its answer open ends when the relay closes the connection
        self._serve = serve
        self._caplog = caplog

    async def open(self, script: Script | None = None, **environment: str) -> InProcess:
        """Let the upstream behave by ``script`` from now on, and open the server if that has not been done."""
        if script is not None:
            self.upstream.script = self._watched(script)
        if self.server is None:
            settings = {"SLUICE_RATE_LIMIT": "off", "LLM_API_KEY": KEY, "LLM_MODEL": "asked"}
            self.server = await self._serve(**settings | {"SLUICE_FAST_PATH": self._fast_path} | environment)
            assert self.server.serving.fast_path is (self._fast_path == "auto")
        return self.server

    async def ask(self, script: Script | None = None, **environment: str) -> Answer:
        """One whole answer; its form is checked."""
        server = await self.open(script, **environment)
        answer = await ask(server.url, QUESTION)
        check_answer(answer)
        assert await until(lambda: self._settled), "I1, I5: no answer runs on, and each has its line in the log"
        return answer

    def logged(self, event: str) -> list[logging.LogRecord]:
        return [record for record in self._records if record.getMessage() == event]

    @property
    def tries(self) -> int:
        """How often the upstream was asked for the one answer that failed, as the log has it."""
        (record,) = self.logged("upstream_failed")
        fields = record.__dict__["sluice_fields"]
        return int(fields["tries"])

    @property
    def pauses(self) -> list[float]:
        """The back-off (s) before each further try."""
        return [record.__dict__["sluice_fields"]["delay_s"] for record in self.logged("upstream_retry")]

    async def check_aftermath(self) -> None:
        """The invariants at the head of the table of faults."""
        assert self.server is not None
        desk = self.server.desk
        assert await until(lambda: desk.streams == 0), "I1: no answer runs on"
        assert await until(lambda: desk.viewers == 0), "I1: no viewer is left"
        assert await until(lambda: self.running == 0), "I2: no request to the upstream is left open"
        assert await until(lambda: self._settled), "I5: one line a request, one a stream's end"
        for call in self.upstream.calls:
            if call.error is not None:
                raise call.error
        for record in self._records:
            line = JsonFormatter().format(record)
            assert record.levelno < logging.ERROR, line
            for secret in (KEY, ECHO, QUESTION):
                assert secret not in line, "I6: no key, no prompt, no upstream's body in the log"

    @property
    def _records(self) -> list[logging.LogRecord]:
        return self._caplog.get_records("call") + self._caplog.get_records("teardown")

    @property
    def _settled(self) -> bool:
        requests = [line for line in self.logged("request") if line.__dict__["sluice_fields"]["path"] == "/api/stream"]
        return len(self.logged("stream_end")) == len(requests)

    def _watched(self, script: Script) -> Script:
        async def run(call: Call) -> None:
            self.running += 1
            try:
                await script(call)
            finally:
                self.running -= 1

        return run


@pytest.fixture(params=["auto", "off"])
async def relay(
    request: pytest.FixtureRequest, serve: Serve, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Relay]:
    """The server before the fixture ``upstream``, by the fast path and by the usual one; after the test the invariants
    are checked."""
    caplog.set_level(logging.DEBUG, logger="sluice")
    relay = Relay(serve, upstream, caplog, request.param)
    yield relay
    if relay.server is not None:
        await relay.check_aftermath()
