"""Name look-ups: their results, their failures, and that nobody waits for one that hangs."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading

import pytest

from server.upstream.resolver import DaemonResolver
from tests.sluice_process import ROOT, free_port


async def test_a_name_becomes_addresses() -> None:
    found = await DaemonResolver().resolve("localhost", 80, socket.AF_INET)
    assert {(result["host"], result["port"], result["hostname"]) for result in found} == {
        ("127.0.0.1", 80, "localhost")
    }


@pytest.mark.parametrize("host", ["nothing.invalid", "a" * 64 + ".invalid"])
async def test_a_name_without_an_address_is_an_error(host: str) -> None:
    with pytest.raises(OSError, match=r"no host name|not known|No address|failure"):
        await DaemonResolver().resolve(host)


async def test_a_look_up_that_nobody_waits_for_any_more_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answer.wait(5) and [])
    looking = asyncio.create_task(DaemonResolver().resolve("slow.invalid"))
    await asyncio.sleep(0.05)
    looking.cancel()
    answer.set()
    await asyncio.wait([looking])
    assert looking.cancelled()


HANGING = """
import socket, sys, time
ask_system = socket.getaddrinfo
def hang(host, *args, **options):
    if host != "slow.invalid":
        return ask_system(host, *args, **options)
    print("asked", flush=True)
    time.sleep(30)
socket.getaddrinfo = hang
import run
sys.exit(run.main([]))
"""


async def test_a_name_server_that_hangs_does_not_hold_up_the_end() -> None:
    """The loop's thread pool would be joined, and a stop take as long as the system's resolver is patient."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HANGING,
        cwd=ROOT,
        env={"LLM_BASE_URL": "http://slow.invalid/v1", "SLUICE_PORT": str(port), "SLUICE_ADMIN_PORT": "0"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(15):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
            writer.write(b"GET /api/stream?q=hi HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await process.stdout.readline() == b"asked\n"
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            writer.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
