"""nginx as a plain ``proxy_pass``: it parses and checks nothing, so no relay that does can be expected to cost less."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ops.bench.procs import Child, free_port

__all__ = ["find_nginx", "open_nginx"]

# Connections are kept on both sides for as long as a run takes: a handshake for every hundredth or thousandth answer
# would not be the relaying that is measured. The rest is nginx's default, or what a stream needs.
_CONFIGURATION = """\
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 100000000;
    upstream endpoint {{
        server 127.0.0.1:{endpoint_port};
        keepalive 1024;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://endpoint;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 3600s;
        }}
    }}
}}
"""


def find_nginx() -> str | None:
    """The path of the program; Debian's lies where a user's PATH does not lead."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@asynccontextmanager
async def open_nginx(endpoint_port: int, core: int) -> AsyncIterator[Child]:
    program = find_nginx()
    assert program is not None, "who asks for nginx has looked whether it is there"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as prefix:
        configuration = _write_configuration(prefix, endpoint_port=endpoint_port, port=port)
        command = [program, "-e", "stderr", "-p", prefix, "-c", configuration]
        async with Child(command, core, port=port) as child:
            yield child


def _write_configuration(prefix: str, **ports: int) -> str:
    path = Path(prefix, "nginx.conf")
    path.write_text(_CONFIGURATION.format(**ports))
    return str(path)
