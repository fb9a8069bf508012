"""An endpoint behind TLS, as nearly all are: the real process, which trusts what SSL_CERT_FILE names."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.sse_client import ask

MAKE = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    *(b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number for number in range(5)),
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
]


@contextlib.asynccontextmanager
async def endpoint(context: ssl.SSLContext) -> AsyncIterator[tuple[int, list[int]]]:
    """Answers whatever it is asked, connections kept: its port, and an item for each connection."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
                writer.write(HEAD)
                for event in EVENTS:
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], connections
    finally:
        server.close()


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize(("host", "reached"), [("localhost", True), ("127.0.0.1", False)], ids=["its name", "another"])
async def test_an_endpoint_is_asked_under_the_name_that_its_certificate_has(
    launch: Launch, need: Callable[[str], str], tmp_path: Path, fast_path: str, host: str, reached: bool
) -> None:
    """U4; and the connection is used again, as without TLS."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = [need("openssl"), *MAKE.split(), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)  # noqa: ASYNC221 (some milliseconds)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with endpoint(context) as (port, connections):
        sluice = await launch(
            LLM_BASE_URL=f"https://{host}:{port}/v1", SSL_CERT_FILE=str(certificate), SLUICE_FAST_PATH=fast_path
        )
        answers = [await ask(sluice.url, "hi") for _ in range(2)]
    if reached:
        assert [answer.text for answer in answers] == ["01234", "01234"]
        assert len(connections) == 1
    else:
        assert [answer.error["error"] for answer in answers] == ["upstream_unreachable"] * 2
