"""What the tests of nginx share: the real one with the shipped site, and clients that speak TLS to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from multidict import CIMultiDict

from tests.sluice_process import ROOT, free_port

SITE = ROOT / "ops" / "nginx" / "sluice.conf"
NAME = "sluice.example.com"  # as in the site file

Need = Callable[[str], str]

# Debian's nginx.conf in what matters, with gzip at its most eager. One process, so that it ends with the test.
NGINX_CONF = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/logs/error.log;
events {{ worker_connections {worker_connections}; }}
http {{
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    default_type application/octet-stream;
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log {folder}/logs/access.log;
    gzip on;
    gzip_types *;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/sluice.conf;
}}
"""


class Nginx:
    """The real nginx with the shipped site; an async context manager.

    Only addresses, names of files and what ``changes`` says are replaced in the site; each has to be there.
    """

    def __init__(
        self,
        program: str,
        folder: Path,
        certificate: Path,
        sluice_port: int,
        changes: dict[str, str] | None = None,
        worker_connections: int = 768,
    ) -> None:
        self.program = program
        self.folder = folder
        self.port = free_port()
        self.http_port = free_port()
        self.tls = ssl.create_default_context(cafile=str(certificate))
        (folder / "logs").mkdir()
        site = SITE.read_text(encoding="utf-8")
        for old, new in {
            "server 127.0.0.1:4001;": f"server 127.0.0.1:{sluice_port};",
            "listen 80;": f"listen 127.0.0.1:{self.http_port};",
            "listen [::]:80;": f"listen 127.0.0.1:{free_port()};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.port} ssl http2;",
            "listen [::]:443 ssl http2;": f"listen 127.0.0.1:{free_port()} ssl http2;",
            f"/etc/letsencrypt/live/{NAME}/fullchain.pem": str(certificate),
            f"/etc/letsencrypt/live/{NAME}/privkey.pem": str(certificate),
            "/var/log/nginx/": f"{folder}/logs/",
            **(changes or {}),
        }.items():
            assert old in site, f"{SITE.name} has no {old!r} any more"
            site = site.replace(old, new)
        (folder / "sluice.conf").write_text(site)
        (folder / "nginx.conf").write_text(NGINX_CONF.format(folder=folder, worker_connections=worker_connections))

    def command(self, *arguments: str) -> list[str]:
        files = ["-p", str(self.folder), "-c", f"{self.folder}/nginx.conf", "-e", f"{self.folder}/logs/error.log"]
        return [self.program, *files, *arguments]

    async def __aenter__(self) -> Nginx:
        self.process = await asyncio.create_subprocess_exec(*self.command(), stdin=asyncio.subprocess.DEVNULL)
        for port in (self.port, self.http_port):
            await self._listens(port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def _listens(self, port: int) -> None:
        async with asyncio.timeout(10):
            while self.process.returncode is None:
                with contextlib.suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    await writer.wait_closed()
                    return
                await asyncio.sleep(0.01)
        raise AssertionError("nginx did not start:\n" + self.logs())

    async def stop(self) -> None:
        """End it, so that its logs are complete."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        await self.process.wait()

    def logs(self) -> str:
        """Everything that it logged anywhere."""
        return "\n".join(file.read_text(encoding="utf-8") for file in sorted((self.folder / "logs").iterdir()))

    def access_log(self) -> list[dict[str, object]]:
        return [
            json.loads(line)
            for line in (self.folder / "logs" / "sluice-access.log").read_text(encoding="utf-8").splitlines()
        ]


@pytest.fixture(scope="session")
def certificate(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate and its key, in one file."""
    pem = tmp_path_factory.mktemp("tls") / "sluice.pem"
    subprocess.run(
        [
            *[need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            *["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"],
            *["-keyout", str(pem), "-out", f"{pem}.crt"],
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text(encoding="utf-8") + Path(f"{pem}.crt").read_text(encoding="utf-8"))
    return pem


StartNginx = Callable[..., Awaitable[Nginx]]


@pytest.fixture
async def start_nginx(need: Need, tmp_path: Path, certificate: Path) -> AsyncIterator[StartNginx]:
    """``await start_nginx(url_or_port, changes={…})``: nginx in front of that server, ended with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(sluice: str | int, **options: object) -> Nginx:
            port = sluice if isinstance(sluice, int) else int(sluice.rstrip("/").rpartition(":")[2])
            nginx = Nginx(need("nginx"), tmp_path, certificate, port, **options)  # type: ignore[arg-type]
            return await stack.enter_async_context(nginx)

        yield start


class Exchange:
    """One request over TLS and HTTP/1.1, and its answer as it arrives."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()

    async def send(self, target: str, *headers: str, method: str = "GET", body: bytes = b"") -> None:
        """Send a request and read the head of its answer."""
        head = "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {NAME}", *headers, "", ""])
        self.writer.write(head.encode("latin-1") + body)
        status_line, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        self.status = int(status_line.split(" ")[1])
        self.headers = header_fields(lines)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The chunks of the body, each as soon as it is here."""
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    async def lines(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            for line in piece.decode().split("\n"):
                yield line

    async def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return await self.reader.readexactly(int(self.headers["Content-Length"]))
        return b"".join([piece async for piece in self.pieces()])

    def fin(self) -> None:
        """As a browser's tab: TLS's goodbye, and at once TCP's (asyncio alone would wait for TLS's answer)."""
        self.writer.close()
        self.half_close()

    def rst(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def half_close(self) -> None:
        # By another descriptor of the same socket: uvloop does not show the one that it has.
        with socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno())) as same:
            same.shutdown(socket.SHUT_WR)


@contextlib.asynccontextmanager
async def connected(nginx: Nginx, source: str = "127.0.0.1") -> AsyncIterator[Exchange]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", nginx.port, ssl=nginx.tls, server_hostname=NAME, local_addr=(source, 0)
    )
    try:
        yield Exchange(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def asked(nginx: Nginx, target: str, *headers: str, source: str = "127.0.0.1") -> AsyncIterator[Exchange]:
    async with connected(nginx, source) as exchange:
        await exchange.send(target, *headers)
        yield exchange


async def lines_of_curl(process: asyncio.subprocess.Process) -> AsyncIterator[str]:
    assert process.stdout is not None
    async for line in process.stdout:
        yield line.decode().rstrip("\n")


@contextlib.asynccontextmanager
async def curl_http2(need: Need, nginx: Nginx, target: str, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``curl --http2`` on its way, with further options of its own; its stdout is the body as it arrives, and then a
    line with version and status."""
    curl = need("curl")
    process = await asyncio.create_subprocess_exec(
        *[
            curl,
            "-q",
            "--noproxy",
            "*",
            "-sS",
            "-N",
            "-k",
            "--http2",
            "--globoff",
            "-w",
            "\n%{http_version} %{http_code}\n",
            *options,
        ],
        *["--connect-to", f"{NAME}:443:127.0.0.1:{nginx.port}", f"https://{NAME}{target}"],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.communicate()


def header_fields(lines: list[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, _, value in (line.partition(": ") for line in lines))
