"""run.py as a process: contract, sections 1, 2 and 7; rows L1 to L4 and L7 to L9, S10."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from server.systemd import Notifier
from tests.api.raw_client import RawClient, request
from tests.conftest import Launch
from tests.sluice_process import ROOT, SluiceProcess, free_port
from tests.sse_client import Answer, ask, open_stream
from tests.upstream_sim import Call, ScriptedUpstream, chunk

PATIENCE: Final = 20.0  # s; whatever takes longer hangs
SOON: Final = 6.0  # s for "at once" and "soon after" on a loaded machine; the farewell alone may take two
SECRET: Final = "sk-canary-0123456789"


class Held:
    """A script: a token at once, and the rest when the test lets go."""

    def __init__(self) -> None:
        self.released = asyncio.Event()

    async def __call__(self, call: Call) -> None:
        await call.head()
        await call.token("Hel")
        await self.released.wait()
        await call.token("lo")
        await call.finish()
        await call.done()


async def endless(call: Call) -> None:
    await call.head()
    while call.open:
        await call.token("on ")
        await asyncio.sleep(0.02)


async def flood(call: Call) -> None:
    await call.head()
    for _ in range(100):
        await call.token("x" * 8000)
    await call.gone()


def now() -> float:
    return asyncio.get_running_loop().time()


async def fetch(url: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
        session.get(url) as response,
    ):
        return response.status, await response.json()


async def read_response(reader: asyncio.StreamReader) -> bytes:
    """Head and body of a response that says its length, on a connection that stays open."""
    async with asyncio.timeout(PATIENCE):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head + await reader.readexactly(length)


async def until(condition: Callable[[], bool | Awaitable[bool]], *, within: float = PATIENCE) -> None:
    """Wait until it holds; what raises an OSError does not hold yet."""
    last = now() + within
    while True:
        with contextlib.suppress(OSError, aiohttp.ClientError):
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
        assert now() < last, "it did not come to that"
        await asyncio.sleep(0.02)


async def exited(process: SluiceProcess, *, within: float = PATIENCE) -> int:
    async with asyncio.timeout(within):
        return await process.exited()


COMMAND: Final = (sys.executable, str(ROOT / "run.py"))


@contextlib.asynccontextmanager
async def started(
    *command: str, stdout: Any = None, stderr: Any = None, pass_fds: Any = (), **environment: str
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """run.py, or a command that becomes it, observed by hand; on no port that is not asked for, with the demo model."""
    inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    process = await asyncio.to_thread(
        subprocess.Popen,
        command or COMMAND,
        env=inherited | {"SLUICE_PORT": "0", "SLUICE_ADMIN_PORT": "0"} | environment,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def ended(process: subprocess.Popen[bytes], *, within: float = PATIENCE) -> int:
    return await asyncio.to_thread(process.wait, within)


def in_shell(command: str) -> tuple[str, ...]:
    """``command`` with run.py as its ``"$0" "$@"``."""
    return ("/bin/sh", "-c", command, *COMMAND)


class Failed:
    """How a process ended that was not to start."""

    def __init__(self, status: int | None, output: bytes) -> None:
        self.status = status
        self.lines = output.decode().splitlines()


async def fail_to_start(**environment: str) -> Failed:
    async with started(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **environment) as process:
        output, _ = await asyncio.to_thread(process.communicate, timeout=PATIENCE)
        return Failed(process.returncode, output)


@pytest.fixture
async def streams() -> AsyncIterator[Callable[[str, int], Awaitable[list[asyncio.Task[Answer]]]]]:
    """``await streams(url, 3)`` opens streams and returns when each has shown its first token; each task gives what
    came until the end."""
    tasks: list[asyncio.Task[Answer]] = []

    async def follow(url: str, first: asyncio.Event) -> Answer:
        async with open_stream(url) as stream:
            await stream.token()
            first.set()
            await stream.read_all()
            return stream.answer

    async def start(url: str, count: int) -> list[asyncio.Task[Answer]]:
        begun = [asyncio.Event() for _ in range(count)]
        new = [asyncio.create_task(follow(url, event)) for event in begun]
        tasks.extend(new)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(event.wait() for event in begun))
        return new

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


Streams = Callable[[str, int], Coroutine[Any, Any, list[asyncio.Task[Answer]]]]


def assert_interrupted(answer: Answer) -> None:
    """The in-band error of section 3, as the last event, and no ``[DONE]``."""
    assert answer.error["error"] == "interrupted"
    assert answer.error["retryable"] is True
    assert answer.events[-1].json == answer.error
    assert not answer.complete


# ---- Start


async def test_without_an_endpoint_the_demo_model_answers_and_stderr_says_so(launch: Launch) -> None:
    """Section 1: with no LLM_BASE_URL."""
    process = await launch()
    (line,) = process.events("demo_model")
    assert line["level"] == "warning"
    assert "LLM_BASE_URL is not set" in line["note"]
    answer = await ask(process.url, "What is Sluice?")
    assert (answer.status, answer.complete) == (200, True)
    assert len(answer.tokens) > 5
    process.signal(signal.SIGTERM)
    assert await exited(process, within=SOON) == 0


async def test_demo_on_the_command_line_leaves_the_endpoint_alone(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Section 1: ``--demo``; and the key of the endpoint does not go to the demo, either."""
    process = await launch("--demo", LLM_BASE_URL=upstream.base_url, LLM_API_KEY=SECRET)
    async with open_stream(process.url, "What is Sluice?") as stream:
        assert await stream.token()
    assert process.events("demo_model")
    assert upstream.connections == 0


async def test_it_says_where_it_listens_and_that_it_is_ready(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Section 7: /healthz, /readyz."""
    process = await launch(LLM_BASE_URL=upstream.base_url, LLM_MODEL="some-model")
    (line,) = process.events("listening")
    assert (line["url"], line["admin_url"], line["model"]) == (process.url, process.admin_url, "some-model")
    assert await fetch(f"{process.admin_url}/healthz") == (200, {"status": "ok"})
    assert await fetch(f"{process.admin_url}/readyz") == (200, {"status": "ready", "reasons": []})
    assert (await ask(process.url)).text == "Hello"
    assert process.events("demo_model") == []


async def test_the_admin_listener_can_be_off(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Section 2: port 0."""
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_ADMIN_PORT="0")
    assert process.admin_url == ""
    assert (await ask(process.url)).text == "Hello"


@pytest.mark.parametrize("variable", ["SLUICE_PORT", "SLUICE_ADMIN_PORT"])
async def test_a_port_in_use_is_one_line_and_1(variable: str) -> None:
    """Row L7."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = await fail_to_start(**{variable: str(port)})
    assert failed.status == 1
    (line,) = failed.lines
    assert json.loads(line)["reason"] == f"cannot listen on 127.0.0.1 port {port}: Address already in use"


async def test_of_two_that_want_a_port_at_once_one_gets_it() -> None:
    """The other ends with 1 and its line, at whatever instant they meet."""
    port = str(free_port())
    async with (
        started(stderr=subprocess.PIPE, SLUICE_PORT=port) as one,
        started(stderr=subprocess.PIPE, SLUICE_PORT=port) as other,
    ):
        await until(lambda: one.poll() is not None or other.poll() is not None)
        loser = other if one.poll() is None else one
        assert loser.returncode == 1
        assert loser.stderr is not None
        (line,) = loser.stderr.readlines()
        assert json.loads(line)["event"] == "cannot_listen"
        await until(lambda: _completes(f"http://127.0.0.1:{port}"))


# ---- The Unix socket


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s.sock")


def is_there(path: str) -> bool:
    return os.path.lexists(path)


async def ask_unix(path: str, target: str = "/api/stream?q=hi") -> bytes:
    """A whole response over the Unix socket."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(f"GET {target} HTTP/1.0\r\nHost: sluice.test\r\n\r\n".encode())
        response = await reader.read()
        writer.close()
        await writer.wait_closed()
        return response


async def test_it_serves_on_a_unix_socket_and_removes_it(launch: Launch, upstream: ScriptedUpstream, path: str) -> None:
    """Section 2: ``SLUICE_SOCKET=/path`` for a Unix socket instead."""
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    assert process.url == f"unix:{path}"
    response = await ask_unix(path)
    assert response.startswith(b"HTTP/1.0 200 ")
    assert response.endswith(b"data: [DONE]\n\n")
    process.signal(signal.SIGTERM)
    assert await exited(process, within=SOON) == 0
    assert not is_there(path)


async def test_a_socket_that_a_killed_process_left_is_reclaimed(
    launch: Launch, upstream: ScriptedUpstream, path: str
) -> None:
    """Row L7."""
    killed = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    killed.signal(signal.SIGKILL)
    await exited(killed)
    assert is_there(path)
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    assert b"[DONE]" in await ask_unix(path)


async def test_a_socket_in_use_is_one_line_and_1(launch: Launch, upstream: ScriptedUpstream, path: str) -> None:
    """Row L7: and the one who uses it does not notice."""
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    failed = await fail_to_start(SLUICE_SOCKET=path)
    assert failed.status == 1
    (line,) = failed.lines
    assert json.loads(line)["reason"] == f"cannot listen on {path}: Address already in use"
    assert b"[DONE]" in await ask_unix(path)


def test_a_file_at_the_sockets_path_is_not_deleted(path: str) -> None:
    """Row L7."""
    Path(path).write_text("precious")
    failed = asyncio.run(fail_to_start(SLUICE_SOCKET=path))
    assert (failed.status, len(failed.lines)) == (1, 1)
    assert Path(path).read_text() == "precious"


async def test_a_successor_that_takes_the_path_during_the_drain_keeps_it(
    launch: Launch, upstream: ScriptedUpstream, path: str
) -> None:
    """A deploy without systemd: the new process starts while the old one lets its streams finish."""
    upstream.script = Held()
    old = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    last = asyncio.create_task(ask_unix(path))
    await upstream.called()
    old.signal(signal.SIGTERM)
    await until(lambda: bool(old.events("draining")))
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_SOCKET=path)
    upstream.script.released.set()
    assert b"[DONE]" in await last
    assert await exited(old) == 0
    assert b"[DONE]" in await ask_unix(path)


# ---- The end


async def test_sigterm_lets_open_streams_finish(launch: Launch, upstream: ScriptedUpstream, streams: Streams) -> None:
    """Section 7, row L1: they end with ``[DONE]``; nothing new is taken; /readyz tells; exit 0 soon after the last."""
    upstream.script = held = Held()
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_MAX_STREAMS_PER_CLIENT="50", SLUICE_RATE_LIMIT="off")
    host, port = process.url.removeprefix("http://").split(":")
    kept_reader, kept_writer = await asyncio.open_connection(host, int(port))
    answers = await streams(process.url, 20)

    process.signal(signal.SIGTERM)
    await until(lambda: bool(process.events("draining")))

    assert await fetch(f"{process.admin_url}/healthz") == (200, {"status": "ok"})
    assert await fetch(f"{process.admin_url}/readyz") == (503, {"status": "unready", "reasons": ["draining"]})
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))
    kept_writer.write(b"GET /api/stream?q=hi HTTP/1.1\r\nHost: x\r\n\r\n")
    refused = await read_response(kept_reader)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: " in refused
    assert b'"error":"shutting_down"' in refused
    assert len(upstream.calls) == 20

    held.released.set()
    finished = await asyncio.gather(*answers)
    assert [(answer.text, answer.complete) for answer in finished] == [("Hello", True)] * 20
    assert await exited(process, within=SOON) == 0
    kept_writer.close()
    assert [line["outcome"] for line in process.events("stream_end")] == ["completed"] * 20
    assert process.events("stopped")


async def test_streams_without_an_end_are_interrupted_when_the_drain_is_over(
    launch: Launch, upstream: ScriptedUpstream, streams: Streams
) -> None:
    """Section 7, row L2: in-band, retryable, no ``[DONE]``; exit 0; the upstream requests are closed."""
    upstream.script = endless
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_DRAIN_TIMEOUT="1")
    answers = await streams(process.url, 3)
    began_at = now()
    process.signal(signal.SIGTERM)
    for answer in await asyncio.gather(*answers):
        assert_interrupted(answer)
    assert now() - began_at > 0.9
    assert await exited(process, within=SOON) == 0
    await until(lambda: not upstream.open_calls)
    assert [line["outcome"] for line in process.events("stream_end")] == ["interrupted"] * 3


async def test_a_drain_of_0_interrupts_at_once(launch: Launch, upstream: ScriptedUpstream, streams: Streams) -> None:
    upstream.script = endless
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_DRAIN_TIMEOUT="0")
    (answer,) = await streams(process.url, 1)
    process.signal(signal.SIGTERM)
    assert_interrupted(await answer)
    assert await exited(process, within=SOON) == 0


async def test_a_request_whose_body_is_still_coming_is_answered(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Contract, section 3: 503 ``shutting_down``, and not a connection that closes without a word."""
    process = await launch(LLM_BASE_URL=upstream.base_url)
    body = b'{"messages":[{"role":"user","content":"hi"}]}'
    async with await RawClient.connect(int(process.url.rpartition(":")[2])) as client:
        head = ("Content-Type: application/json", f"Content-Length: {len(body)}")
        await client.send(request("/api/streams", *head, method="POST", body=body[:5]))
        await asyncio.sleep(0.2)
        process.signal(signal.SIGTERM)
        await until(lambda: bool(process.events("draining")), within=SOON)
        await asyncio.sleep(1.5)  # longer than aiohttp's own patience with what is under way
        await client.send(body[5:])
        response = await client.read_response()
    assert (response.status, response.error) == (503, "shutting_down")
    assert await exited(process, within=SOON) == 0
    assert upstream.calls == []


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
    ids=lambda number: number.name,
)
async def test_a_second_signal_cuts_the_drain_short(
    launch: Launch, upstream: ScriptedUpstream, streams: Streams, first: signal.Signals, second: signal.Signals
) -> None:
    """Section 7, row L3: ``interrupted`` at once, still in-band, exit 0. Ctrl-C is as good as SIGTERM."""
    upstream.script = endless
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_DRAIN_TIMEOUT="60")
    answers = await streams(process.url, 2)
    process.signal(first)
    await until(lambda: bool(process.events("draining")))
    await asyncio.sleep(0.3)
    assert not any(answer.done() for answer in answers)
    process.signal(second)
    for answer in await asyncio.gather(*answers):
        assert_interrupted(answer)
    assert await exited(process, within=SOON) == 0
    await until(lambda: not upstream.open_calls)


async def test_many_signals_are_as_good_as_two(launch: Launch, upstream: ScriptedUpstream, streams: Streams) -> None:
    """Somebody leans on Ctrl-C; no traceback, no other exit status."""
    upstream.script = endless
    process = await launch(LLM_BASE_URL=upstream.base_url)
    (answer,) = await streams(process.url, 1)
    for _ in range(10):
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGINT)
        await asyncio.sleep(0.01)
    assert_interrupted(await answer)
    assert await exited(process, within=SOON) == 0
    assert "Traceback" not in "".join(process.lines)


async def test_an_idle_process_ends_at_once(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Kept connections without a stream are no reason to wait, neither public nor admin ones."""
    process = await launch(LLM_BASE_URL=upstream.base_url)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{process.url}/"), session.get(f"{process.admin_url}/healthz"):
            pass
        process.signal(signal.SIGTERM)
        assert await exited(process, within=SOON) == 0


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.3, 0.45])
async def test_sigterm_during_start_up_ends_it(delay: float) -> None:
    """Row L3: by the signal or with 0, soon, and without a traceback."""
    async with started(stderr=subprocess.PIPE) as process:
        await asyncio.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, output = await asyncio.to_thread(process.communicate, timeout=PATIENCE)
    assert process.returncode in (0, -signal.SIGTERM)
    assert b"Traceback" not in output


async def test_a_reader_that_takes_nothing_does_not_delay_the_end(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Row L4: aborted, not waited for."""
    upstream.script = flood
    process = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_DRAIN_TIMEOUT="1")
    host, port = process.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(b"GET /api/stream?q=hi HTTP/1.1\r\nHost: x\r\n\r\n")
        await upstream.called()
        await asyncio.sleep(0.5)  # the buffers on the way fill
        process.signal(signal.SIGTERM)
        assert await exited(process, within=1 + SOON) == 0
    assert [line["outcome"] for line in process.events("stream_end")] == ["interrupted"]


# ---- systemd

# As systemd does: descriptor 3, and the process's number in its own environment.
PASS_DESCRIPTOR: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Notifications:
    """What ``NOTIFY_SOCKET`` got (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    async def next(self) -> str:
        async with asyncio.timeout(PATIENCE):
            return (await asyncio.get_running_loop().sock_recv(self.socket, 4096)).decode()


@pytest.mark.parametrize("family", ["path", "abstract"])
async def test_systemd_is_told_of_ready_alive_and_stopping(
    launch: Launch, upstream: ScriptedUpstream, streams: Streams, tmp_path: Path, family: str
) -> None:
    """Section 7: ``Type=notify``, watchdog; alive is also said while it drains."""
    address = str(tmp_path / "notify") if family == "path" else f"@sluice-test-{os.getpid()}"
    notifications = Notifications(address)
    with notifications.socket:
        upstream.script = held = Held()
        process = await launch(LLM_BASE_URL=upstream.base_url, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        (answer,) = await streams(process.url, 1)
        got = [await notifications.next() for _ in range(5)]
        assert sorted(set(got)) == ["READY=1", "WATCHDOG=1"]
        assert got.count("READY=1") == 1
        process.signal(signal.SIGTERM)
        while await notifications.next() != "STOPPING=1":
            pass
        assert [await notifications.next() for _ in range(2)] == ["WATCHDOG=1"] * 2
        held.released.set()
        assert (await answer).complete
        assert await exited(process, within=SOON) == 0


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens-here"])
async def test_a_notify_socket_that_is_not_there_does_no_harm(
    launch: Launch, upstream: ScriptedUpstream, address: str
) -> None:
    process = await launch(LLM_BASE_URL=upstream.base_url, NOTIFY_SOCKET=address, WATCHDOG_USEC="junk")
    assert (await ask(process.url)).complete


async def test_a_passed_socket_wins_and_a_restart_refuses_nobody(upstream: ScriptedUpstream) -> None:
    """Sections 2 and 7: LISTEN_FDS wins over host and port; between two processes the kernel keeps who comes."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        url = f"http://127.0.0.1:{passed.getsockname()[1]}"
        taken = free_port()
        for _ in range(2):
            # In the queue before the process is there to take it out.
            waiting = asyncio.create_task(ask(url))
            await asyncio.sleep(0.1)
            async with started(
                *(sys.executable, "-c", PASS_DESCRIPTOR, str(passed.fileno()), *COMMAND),
                pass_fds=[passed.fileno()],
                LISTEN_FDS="1",
                LLM_BASE_URL=upstream.base_url,
                SLUICE_PORT=str(taken),
            ) as process:
                assert (await waiting).text == "Hello"
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", taken)
                process.send_signal(signal.SIGTERM)
                assert await ended(process, within=SOON) == 0


# ---- Few descriptors


async def test_out_of_descriptors_it_refuses_cleanly_and_recovers(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """Row L8: ``ulimit -n 64`` and 200 connects: no flood in the log, /healthz lives, and all is well afterwards."""
    port, admin_port = free_port(), free_port()
    url, admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
    log = tmp_path / "log"

    async def healthy() -> bool:
        return await fetch(f"{admin_url}/healthz") == (200, {"status": "ok"})

    with log.open("wb") as stderr:
        async with started(
            *in_shell('ulimit -n 64; exec "$0" "$@"'),
            stderr=stderr,
            LLM_BASE_URL=upstream.base_url,
            SLUICE_PORT=str(port),
            SLUICE_ADMIN_PORT=str(admin_port),
        ):
            await until(healthy)
            assert await _completes(url)
            lines_before = len(log.read_text().splitlines())
            with contextlib.ExitStack() as stack:
                for _ in range(200):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                for _ in range(5):
                    assert await healthy()
                    await asyncio.sleep(0.3)
            await until(lambda: _completes(url), within=SOON)
            assert await healthy()
    new = log.read_text().splitlines()[lines_before:]
    assert len(new) <= 30
    assert not [line for line in new if json.loads(line)["level"] == "error"]


async def _completes(url: str) -> bool:
    return (await ask(url)).complete


async def test_it_says_when_there_are_fewer_descriptors_than_streams(upstream: ScriptedUpstream) -> None:
    """Better told at the start than found out at the 17th stream."""
    async with started(
        *in_shell('ulimit -n 96; exec "$0" "$@"'), stderr=subprocess.PIPE, LLM_BASE_URL=upstream.base_url
    ) as process:
        assert process.stderr is not None
        line = json.loads(await asyncio.to_thread(process.stderr.readline))
    assert (line["event"], line["level"], line["connections"]) == ("few_descriptors", "warning", 16)


# ---- stderr


async def test_a_stderr_that_nobody_reads_never_blocks_serving(upstream: ScriptedUpstream) -> None:
    """Row L9: far more lines than the pipe holds; it serves, and it ends."""
    port = free_port()
    async with started(stderr=subprocess.PIPE, LLM_BASE_URL=upstream.base_url, SLUICE_PORT=str(port)) as process:
        await until(lambda: _completes(f"http://127.0.0.1:{port}"))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(300):  # 64 KiB of the pipe, at 400 bytes a line
            writer.write(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 300))
            await read_response(reader)
        writer.close()
        await writer.wait_closed()
        assert await _completes(f"http://127.0.0.1:{port}")
        process.send_signal(signal.SIGTERM)
        assert await ended(process, within=SOON) == 0


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
async def test_without_a_stderr_it_serves_all_the_same(upstream: ScriptedUpstream, redirection: str) -> None:
    """Row L9: closed, or on a full disk; and no line of the log goes into a client's socket that got the number 2."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    async with started(
        *in_shell(f'exec "$0" "$@" {redirection}'), LLM_BASE_URL=upstream.base_url, SLUICE_PORT=str(port)
    ) as process:
        await until(lambda: _completes(url))
        assert (await ask(url)).text == "Hello"
        process.send_signal(signal.SIGTERM)
        assert await ended(process, within=SOON) == 0


async def test_a_stderr_that_closes_while_it_serves_does_no_harm(upstream: ScriptedUpstream) -> None:
    """Row L9: ``python run.py 2>&1 | head -1``."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    async with started(stderr=subprocess.PIPE, LLM_BASE_URL=upstream.base_url, SLUICE_PORT=str(port)) as process:
        assert process.stderr is not None
        await asyncio.to_thread(process.stderr.readline)
        process.stderr.close()
        await until(lambda: _completes(url))
        assert (await ask(url)).text == "Hello"
        process.send_signal(signal.SIGTERM)
        assert await ended(process, within=SOON) == 0


# ---- Secrets and questions


def command_line(pid: int) -> str:
    """As every user of the machine can read it."""
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_neither_key_nor_question_nor_answer_shows_anywhere(
    launch: Launch, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Section 7, row S10: at debug, through good answers and every kind of failure, in the log, the answers, the admin
    listener and the command line."""
    key_file = tmp_path / "key"
    key_file.write_text(f"{SECRET}\n")

    async def refuse(call: Call) -> None:
        await call.refuse(401, {"message": f"Incorrect API key {SECRET}", "code": "invalid_api_key"})

    async def not_http(call: Call) -> None:
        await call.send(f"{SECRET} is no HTTP\r\n\r\n".encode())
        call.close()

    async def broken(call: Call) -> None:
        await call.head()
        await call.event(chunk({"content": "the-canary-answer"}))
        call.reset()

    async def invalid(call: Call) -> None:
        await call.head()
        for _ in range(20):
            await call.event(f"{{{SECRET}")
        await call.end()

    async def in_stream(call: Call) -> None:
        await call.head()
        await call.event({"error": {"message": SECRET, "type": "server_error"}})
        await call.end()

    process = await launch(
        LLM_BASE_URL=upstream.base_url,
        LLM_API_KEY_FILE=str(key_file),
        SLUICE_LOG_LEVEL="debug",
        SLUICE_LOG_FORMAT="json",
        SLUICE_RATE_LIMIT="off",
        SLUICE_RETRIES="0",
    )
    good = upstream.script
    seen = ""
    for script in (good, refuse, not_http, broken, invalid, in_stream):
        upstream.script = script
        seen += (await ask(process.url, "the-canary-question")).raw.decode()
    assert upstream.calls[0].headers["Authorization"] == f"Bearer {SECRET}"
    host, port = process.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /?q=the-canary-question HTTP/1.1\r\n{SECRET}\r\n\r\n".encode())
    await reader.read()
    writer.close()
    for target in ("/healthz", "/readyz", "/nothing"):
        async with aiohttp.ClientSession() as session, session.get(process.admin_url + target) as response:
            seen += await response.text()
    seen += command_line(process.pid)
    process.signal(signal.SIGTERM)
    assert await exited(process, within=SOON) == 0

    log = "\n".join(process.lines)
    assert process.events("bad_request")
    assert len(process.events("stream_end")) == 6
    assert SECRET not in seen + log
    assert "the-canary-question" not in log
    assert "the-canary-answer" not in log


async def test_questions_and_answers_are_logged_where_that_is_wished(
    launch: Launch, upstream: ScriptedUpstream
) -> None:
    """Section 7: unless ``SLUICE_LOG_PROMPTS`` says so, for the first two; never the key."""
    process = await launch(LLM_BASE_URL=upstream.base_url, LLM_API_KEY=SECRET, SLUICE_LOG_PROMPTS="true")
    await ask(process.url, "the-canary-question")
    await until(lambda: bool(process.events("stream_end")))
    (line,) = process.events("stream_end")
    assert (line["prompt"], line["answer"]) == ("the-canary-question", "Hello")
    assert SECRET not in "".join(process.lines)


async def test_a_process_out_of_descriptors_still_says_that_it_lives_and_stops(tmp_path: Path) -> None:
    """Else systemd would kill it for a moment's shortage, and the error would come in the place of the drain."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        with Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}) as notifier:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                notifier.stopping()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert systemd.recv(100) == b"STOPPING=1"
