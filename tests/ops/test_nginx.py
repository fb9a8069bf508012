"""The shipped site file in a real nginx, between real clients and the real server (contract sections 3 and 7)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.ops.conftest import (
    NAME,
    SITE,
    Need,
    Nginx,
    StartNginx,
    asked,
    connected,
    curl_http2,
    header_fields,
    lines_of_curl,
)
from tests.sluice_process import free_port
from tests.upstream_sim import Call, ScriptedUpstream

QUESTION = "/api/stream?q=hello"
CANARY = "canary-7f3a"


class RawBackend:
    """In Sluice's place: answers each request as the test says, and counts requests and connections."""

    def __init__(self, reply: Callable[[RawBackend, asyncio.StreamWriter], Awaitable[bool]]) -> None:
        self.reply = reply  # returns whether the connection goes on
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def __aenter__(self) -> RawBackend:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            going_on = True
            while going_on:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                going_on = await self.reply(self, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            writer.close()


async def empty_answer(_: RawBackend, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    return True


async def hold_open(call: Call) -> None:
    """One token, and then silence until the asker goes."""
    await call.head()
    await call.token("first")
    await call.gone()


async def first_token(lines: AsyncIterator[str]) -> None:
    async with asyncio.timeout(10):
        async for line in lines:
            if '"token"' in line:
                return
    raise AssertionError("the stream ended without a token")


def percent(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def test_nginx_accepts_the_site(need: Need, tmp_path: Path, certificate: Path) -> None:
    """``nginx -t``, as the comment at the top of the file asks for."""
    nginx = Nginx(need("nginx"), tmp_path, certificate, 4001)
    checked = subprocess.run(nginx.command("-t"), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_admin_listener_is_not_proxied() -> None:
    """Metrics and dashboard are for the machine itself (section 7)."""
    directives = [line.partition("#")[0] for line in SITE.read_text(encoding="utf-8").splitlines()]
    assert "4002" not in "".join(directives)


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
async def test_tokens_pass_one_by_one(
    protocol: str, upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, need: Need
) -> None:
    """Each token reaches the page the moment it exists, and not when a buffer is full."""
    now = asyncio.get_running_loop().time
    tokens = [f"token{number} " for number in range(20)]
    sent_at: list[float] = []

    async def slowly(call: Call) -> None:
        await call.head()
        for token in tokens:
            sent_at.append(now())
            await call.token(token)
            await asyncio.sleep(0.05)
        await call.finish()
        await call.done()

    upstream.script = slowly
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    seen: list[tuple[float, str]] = []

    async def watch(lines: AsyncIterator[str]) -> str:
        last = ""
        async for line in lines:
            if line.startswith('data: {"token"'):
                seen.append((now(), json.loads(line.removeprefix("data: "))["token"]))
            last = line or last
        return last

    async with asyncio.timeout(30):
        if protocol == "HTTP/2":
            async with curl_http2(need, nginx, QUESTION) as curl:
                assert await watch(lines_of_curl(curl)) == "2 200"
        else:
            async with asked(nginx, QUESTION, "Accept-Encoding: gzip, br") as exchange:
                assert exchange.status == 200
                assert "Content-Encoding" not in exchange.headers
                assert await watch(exchange.lines()) == "data: [DONE]"
    assert [token for _, token in seen] == tokens
    times = [at for at, _ in seen]
    assert times[0] < sent_at[-1]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > 0.015 for gap in gaps) > len(gaps) / 2, gaps


async def test_streams_pass_unbuffered_whatever_the_backend_says(start_nginx: StartNginx) -> None:
    """The site alone keeps nginx from buffering and compressing: no X-Accel-Buffering header is needed."""
    seen = asyncio.Event()

    async def one_then_wait(_: RawBackend, writer: asyncio.StreamWriter) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"9\r\ndata: 1\n\n\r\n")
        await seen.wait()
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
        return True

    async with RawBackend(one_then_wait) as backend, asyncio.timeout(10):
        nginx = await start_nginx(backend.port)
        async with asked(nginx, QUESTION, "Accept-Encoding: gzip") as exchange:
            pieces = exchange.pieces()
            assert await anext(pieces) == b"data: 1\n\n"
            seen.set()
            assert await anext(pieces) == b"data: 2\n\n"


@pytest.mark.parametrize("how", ["fin", "rst", "half_close"])
async def test_a_browser_that_leaves_closes_the_upstream(
    how: str, upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx
) -> None:
    """However it goes: the endpoint is no longer paid for an answer that nobody wants."""
    upstream.script = hold_open
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    async with asked(nginx, QUESTION) as exchange:
        await first_token(exchange.lines())
        assert upstream.calls[0].open
        getattr(exchange, how)()
        async with asyncio.timeout(5):
            await upstream.calls[0].gone()


async def test_an_http2_client_that_leaves_closes_the_upstream(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, need: Need
) -> None:
    upstream.script = hold_open
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    async with curl_http2(need, nginx, QUESTION) as curl:
        await first_token(lines_of_curl(curl))
        assert upstream.calls[0].open
        curl.terminate()
        async with asyncio.timeout(5):
            await upstream.calls[0].gone()


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
async def test_the_longest_question_passes(
    protocol: str, upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, need: Need
) -> None:
    """1000 emoji are a request line of 12 kB (section 3)."""
    question = "😀" * 1000
    target = "/api/stream?q=" + percent(question)
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    if protocol == "HTTP/2":
        async with curl_http2(need, nginx, target) as curl:
            received = [line async for line in lines_of_curl(curl)]
        assert received[-1] == "2 200"
        assert "data: [DONE]" in received
    else:
        async with asked(nginx, target) as exchange:
            assert exchange.status == 200
            assert b"data: [DONE]" in await exchange.body()
    assert [call.json["messages"][-1]["content"] for call in upstream.calls] == [question]


async def test_a_longer_line_is_refused(start_nginx: StartNginx) -> None:
    """20 kB are no question: 414, and Sluice is not troubled."""
    async with RawBackend(empty_answer) as backend:
        nginx = await start_nginx(backend.port)
        async with asked(nginx, "/api/stream?q=" + "x" * 20_000) as exchange:
            assert exchange.status == 414
        assert not backend.requests


async def test_nobody_escapes_the_limit_by_naming_another_address(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx
) -> None:
    """What a client says about its address is overwritten: all of it counts for one bucket (section 8)."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="2/60")
    nginx = await start_nginx(sluice.url)
    statuses = []
    for forged in (
        ["X-Forwarded-For: 203.0.113.1"],
        ["X-Real-IP: 203.0.113.2", "X-Forwarded-For: 203.0.113.3, 203.0.113.4", "X-Forwarded-For: 203.0.113.5"],
        ["X-Real-IP: 203.0.113.6", "Forwarded: for=203.0.113.7", "True-Client-IP: 203.0.113.8"],
    ):
        async with asked(nginx, QUESTION, *forged) as exchange:
            await exchange.body()
            statuses.append(exchange.status)
    assert statuses == [200, 200, 429]


async def test_each_client_behind_nginx_has_its_own_bucket(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx
) -> None:
    sluice = await launch(
        LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="1/60", SLUICE_TRUSTED_PROXIES="127.0.0.1/32"
    )
    nginx = await start_nginx(sluice.url)
    statuses = []
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.2"):
        async with asked(nginx, QUESTION, source=source) as exchange:
            await exchange.body()
            statuses.append(exchange.status)
    assert statuses == [200, 200, 429]


async def test_no_log_shows_a_question(upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx) -> None:
    """Not of a whole answer, a client that left, an over-long line, nor a question sent in the clear (section 7)."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    referer = f"Referer: https://{NAME}/?q={CANARY}"
    target = f"/api/stream?q={CANARY}"
    async with asked(nginx, target, referer) as exchange:
        await exchange.body()
    async with asked(nginx, f"/?q={CANARY}", referer) as exchange:
        await exchange.body()
    async with asked(nginx, target + "x" * 20_000, referer) as exchange:
        assert exchange.status == 414
    upstream.script = hold_open
    async with asked(nginx, target, referer) as exchange:
        await first_token(exchange.lines())
        exchange.rst()
        async with asyncio.timeout(5):
            await upstream.calls[-1].gone()
    reader, writer = await asyncio.open_connection("127.0.0.1", nginx.http_port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: {NAME}\r\n{referer}\r\nConnection: close\r\n\r\n".encode())
    assert b"308 Permanent Redirect" in await reader.read()
    writer.close()
    await writer.wait_closed()
    await nginx.stop()
    assert CANARY not in nginx.logs()
    logged = [(line["path"], line["status"]) for line in nginx.access_log()]
    assert logged.count(("/api/stream", 200)) == 2
    assert ("/api/stream", 308) in logged
    assert 414 in [status for _, status in logged]


@pytest.mark.parametrize("fault", ["refused", "socket missing", "connections used up"])
async def test_no_log_shows_a_question_when_nginx_fails(fault: str, start_nginx: StartNginx) -> None:
    """nginx logs these at `error`, `crit` and `alert`, each with the request line."""
    port = free_port()

    async def for_ever(_: RawBackend, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.Event().wait()
        return False

    async with RawBackend(for_ever) as backend, contextlib.AsyncExitStack() as streams:
        if fault == "refused":
            nginx = await start_nginx(port)
        elif fault == "socket missing":
            nginx = await start_nginx(port, changes={f"server 127.0.0.1:{port};": "server unix:/nonexistent.sock;"})
        else:  # four listeners, two streams of two connections, and the third client's own
            nginx = await start_nginx(backend.port, worker_connections=9)
            for _ in range(2):
                held = await streams.enter_async_context(asked(nginx, QUESTION))
                assert held.status == 200
        async with asked(nginx, f"/api/stream?q={CANARY}", f"Referer: https://{NAME}/?q={CANARY}") as exchange:
            assert exchange.status == (500 if fault == "connections used up" else 502)
            await exchange.body()
        await nginx.stop()
    assert CANARY not in nginx.logs()
    assert [line["path"] for line in nginx.access_log() if line["status"] in (500, 502)] == ["/api/stream"]


@pytest.mark.parametrize(("how", "status"), [("closes", 502), ("closes a kept connection", 502), ("is silent", 504)])
async def test_no_question_is_asked_twice(how: str, status: int, start_nginx: StartNginx) -> None:
    """A GET costs a generation, and nginx cannot know whether the one that it lost was begun."""

    async def read_and_fail(backend: RawBackend, writer: asyncio.StreamWriter) -> bool:
        if how == "closes a kept connection" and len(backend.requests) == 1:
            return await empty_answer(backend, writer)
        if how == "is silent":
            await asyncio.sleep(30)
        return False

    async with RawBackend(read_and_fail) as backend, asyncio.timeout(20):
        nginx = await start_nginx(backend.port, changes={"proxy_read_timeout 75s;": "proxy_read_timeout 1s;"})
        if how == "closes a kept connection":
            async with asked(nginx, "/api/stream?q=first") as exchange:
                assert exchange.status == 200
            backend.requests[:] = [b"the first"]
        async with asked(nginx, "/api/stream?q=second") as exchange:
            assert exchange.status == status
        await asyncio.sleep(0.2)
        assert sum(b"q=second" in request for request in backend.requests) == 1
        assert backend.connections == 1


@pytest.mark.parametrize("path", ["/api/stream?q=x", "/api/streams/abc", "/v1/models"])
async def test_a_missing_sluice_is_told_in_json(path: str, start_nginx: StartNginx) -> None:
    """A program that calls the API never has to read HTML."""
    nginx = await start_nginx(free_port())
    async with asked(nginx, path) as exchange:
        assert exchange.status == 502
        assert exchange.headers["Content-Type"] == "application/json"
        error = json.loads(await exchange.body())["error"]
        assert (error["code"] if path.startswith("/v1/") else error) == "unavailable"


COMPLETION = {"stream": True, "messages": [{"role": "user", "content": "hi"}]}
UI_CHAT = {"id": "c", "messages": [{"id": "u", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", COMPLETION), ("/api/chat", UI_CHAT)], ids=["openai", "aisdk"]
)
async def test_posted_questions_stream_too(
    path: str,
    body: dict[str, object],
    upstream: ScriptedUpstream,
    launch: Launch,
    start_nginx: StartNginx,
    need: Need,
) -> None:
    """Sections 5 and 6 behind nginx: the first token is there while the second does not exist yet."""
    seen = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.token("first-of-two")
        await seen.wait()
        await call.token("second-of-two")
        await call.finish()
        await call.done()

    upstream.script = script
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    options = ["-H", "Content-Type: application/json", "--data", json.dumps(body)]
    async with asyncio.timeout(20), curl_http2(need, nginx, path, *options) as curl:
        lines = []
        async for line in lines_of_curl(curl):
            lines.append(line)
            if "first-of-two" in line:
                seen.set()
    assert sum("of-two" in line for line in lines) == 2
    assert "data: [DONE]" in lines
    assert lines[-1] == "2 200"


async def test_a_missing_sluice_is_told_to_a_chat_in_words(start_nginx: StartNginx) -> None:
    """The AI SDK shows what is refused to people, as it is."""
    nginx = await start_nginx(free_port())
    async with asked(nginx, "/api/chat/c1/stream") as exchange:
        assert exchange.status == 502
        assert exchange.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert await exchange.body() == b"The service is not available right now. Please try again."


async def test_a_request_id_passes(upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx) -> None:
    """One id in nginx's log, in Sluice and in the answer: the caller's if it is a fit one."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    ids = []
    for header in ("X-Request-ID: job-42.a_B", "X-Request-ID: no spaces", "X-Nothing: at all"):
        async with asked(nginx, QUESTION, header) as exchange:
            await exchange.body()
            ids.append(exchange.headers["X-Request-ID"])
    await nginx.stop()
    assert ids[0] == "job-42.a_B"
    assert all(len(made) == 32 for made in ids[1:])
    assert [line["id"] for line in nginx.access_log()] == ids


async def test_plain_http_leads_to_https(start_nginx: StartNginx) -> None:
    """To the configured name, whatever Host said; and https says to stay there."""
    async with RawBackend(empty_answer) as backend:
        nginx = await start_nginx(backend.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", nginx.http_port)
        writer.write(b"GET /a?b=%20 HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        head = (await reader.read()).decode().split("\r\n\r\n")[0].split("\r\n")
        writer.close()
        await writer.wait_closed()
        assert head[0].startswith("HTTP/1.1 308 ")
        assert f"Location: https://{NAME}/a?b=%20" in head
        assert "Server: nginx" in head
        assert not backend.requests
        async with asked(nginx, "/") as exchange:
            assert exchange.headers["Strict-Transport-Security"] == "max-age=31536000"


async def test_sluice_is_told_host_scheme_and_address(start_nginx: StartNginx) -> None:
    """The origin check compares scheme and host with port; the limits count the address."""
    async with RawBackend(empty_answer) as backend:
        nginx = await start_nginx(backend.port)
        async with connected(nginx) as exchange:
            await exchange.send("/api/stream?q=1", "X-Forwarded-Proto: ftp")
            await exchange.send("/v1/models")
            await exchange.send("/")
        assert backend.connections == 1, "the connection to Sluice was not kept"
        for request in backend.requests:
            assert request.split(b"\r\n")[0].endswith(b" HTTP/1.1")
            told = header_fields(request.decode().strip().split("\r\n")[1:])
            assert told.getall("Host") == [NAME]
            assert told.getall("X-Forwarded-Proto") == ["https"]
            assert told.getall("X-Forwarded-For") == told.getall("X-Real-IP") == ["127.0.0.1"]
            assert "Connection" not in told
