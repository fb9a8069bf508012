"""The shipped units and the example configuration, and what systemd asks of the process (contract sections 2 and 7)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, ClientTimeout, TCPConnector

from server.settings import Settings, options
from tests.conftest import Launch
from tests.sluice_process import ROOT, SluiceProcess, free_port
from tests.upstream_sim import ScriptedUpstream

UNITS = ROOT / "ops" / "systemd"
SERVICE = UNITS / "sluice.service"
SOCKET = UNITS / "sluice.socket"
EXAMPLE = UNITS / "sluice.toml"

Need = Callable[[str], str]


def directives(unit: Path) -> dict[str, list[str]]:
    """The unit's settings, each with all its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def only(unit: Path, name: str) -> str:
    (value,) = directives(unit)[name]
    return value


# ---- The files


def test_systemd_accepts_the_units(need: Need, tmp_path: Path) -> None:
    service = SERVICE.read_text(encoding="utf-8")
    for shipped, here in (("/opt/sluice/.venv/bin/python", sys.executable), ("/opt/sluice/", f"{ROOT}/")):
        assert shipped in service
        service = service.replace(shipped, here)
    (tmp_path / SERVICE.name).write_text(service)
    shutil.copy(SOCKET, tmp_path)
    verified = subprocess.run(
        [need("systemd-analyze"), "verify", "--man=no", str(tmp_path / SERVICE.name), str(tmp_path / SOCKET.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    assert "sluice" not in verified.stderr  # a directive that it does not know is a warning only


def test_the_service_is_well_locked_up(need: Need) -> None:
    """2.5 of 10 or better in systemd's own rating of what a break-in would find open."""
    rated = subprocess.run(
        [need("systemd-analyze"), "security", "--offline=true", "--no-pager", str(SERVICE)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for sluice\.service: ([0-9.]+)", rated.stdout)
    assert found, rated.stdout + rated.stderr
    assert float(found[1]) <= 2.5, rated.stdout


def test_the_unit_outlasts_the_drain() -> None:
    """SIGKILL must not come while streams are still told that they end (section 7)."""
    assert int(only(SERVICE, "TimeoutStopSec")) >= Settings().drain_timeout + 10


def test_the_unit_gives_descriptors_for_all_streams() -> None:
    """Two for each stream; connections are admitted up to half of the limit."""
    assert int(only(SERVICE, "LimitNOFILE")) >= 2 * Settings().max_streams * 1.5


def test_the_socket_is_where_nginx_and_the_defaults_look() -> None:
    address = only(SOCKET, "ListenStream")
    assert address == f"{Settings().host}:{Settings().port}"
    assert f"server {address};" in (ROOT / "ops" / "nginx" / "sluice.conf").read_text(encoding="utf-8")


def checked(config: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SLUICE_CONFIG"}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--config", str(config), "--check"],
        env={name: value for name, value in environment.items() if not name.startswith(("SLUICE_", "LLM_"))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_sluice_accepts_the_example_configuration() -> None:
    accepted = checked(EXAMPLE)
    assert accepted.returncode == 0, accepted.stderr


def test_what_the_example_comments_out_is_the_default(tmp_path: Path) -> None:
    """Every setting but the key stands there, under its own name and with its own default."""
    text = re.sub(r"(?m)^#(?=[a-z_]+ = )", "", EXAMPLE.read_text(encoding="utf-8"))
    whole = tmp_path / "sluice.toml"
    whole.write_text(text, encoding="utf-8")
    accepted = checked(whole)
    assert accepted.returncode == 0, accepted.stderr
    named = re.findall(r"(?m)^([a-z_]+) = ", text)
    assert sorted(named) == sorted(option.name for option in options() if not option.secret)
    bare = tmp_path / "bare.toml"
    bare.write_text("")
    examples = {"LLM_BASE_URL", "SLUICE_SOCKET", "SLUICE_SYSTEM_PROMPT", "SLUICE_LOG_FORMAT"}
    assert settings_of(accepted.stdout, examples) == settings_of(checked(bare).stdout, examples)


def settings_of(printed: str, without: set[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in printed.splitlines())
    return {name: value for name, _, value in pairs if name not in without}


# ---- The process


class Spawned(SluiceProcess):
    """The server started by another command than the usual one."""

    def __init__(self, command: list[str], environment: dict[str, str], **options: object) -> None:
        super().__init__(environment)
        self.command = command
        self.options = options

    async def __aenter__(self) -> Spawned:
        """Start it without waiting: what is passed a socket listens before it runs."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            env=inherited | {"SLUICE_ADMIN_PORT": "0"} | self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            **self.options,  # type: ignore[arg-type]
        )
        self._reader = asyncio.create_task(self._read_stderr())
        return self

    async def listening(self) -> None:
        listening = asyncio.create_task(self._listening.wait())
        await asyncio.wait({listening, self._reader}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        assert self._listening.is_set(), "Sluice did not start:\n" + "\n".join(self.lines)


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[ClientSession]:
    """A client whose every request is a new connection."""
    connector = TCPConnector(force_close=True)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=20)) as client:
        yield client


async def ask(client: ClientSession, url: str) -> tuple[int, str]:
    async with client.get(f"{url}/api/stream", params={"q": "hello"}) as response:
        return response.status, await response.text()


async def test_the_process_serves_on_the_socket_that_systemd_passes(upstream: ScriptedUpstream, need: Need) -> None:
    """LISTEN_FDS wins over host and port (section 2)."""
    port, other = free_port(), free_port()
    settings = {"LLM_BASE_URL": upstream.base_url, "SLUICE_PORT": str(other), "SLUICE_ADMIN_PORT": "0"}
    command = [need("systemd-socket-activate"), "-l", f"127.0.0.1:{port}"]
    command += [f"-E{name}={value}" for name, value in settings.items()]
    async with Spawned([*command, sys.executable, str(ROOT / "run.py")], {}) as server, session() as client:
        async with asyncio.timeout(10):
            while True:  # until systemd-socket-activate listens
                with contextlib.suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                await asyncio.sleep(0.02)
        await server.listening()
        assert server.url == f"http://127.0.0.1:{port}"
        status, text = await ask(client, server.url)
        assert status == 200
        assert "data: [DONE]" in text
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", other)
        writer.close()
        await writer.wait_closed()
        server.signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await server.exited() == 0


# What systemd does for a service with a socket: descriptor 3 is the socket, LISTEN_PID the process.
PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
passed = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execve(sys.executable, [sys.executable, *sys.argv[2:]], os.environ | passed)
"""


async def test_a_restart_refuses_no_connection(upstream: ScriptedUpstream) -> None:
    """While nobody accepts, the kernel queues what arrives at the socket that systemd holds (section 7).

    Only who had connected just before may be told `shutting_down`, and once: the next connection is the new process's.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        visitors_at_once = 4
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-c", PASS_SOCKET, str(listener.fileno()), str(ROOT / "run.py")]
        settings = {"LLM_BASE_URL": upstream.base_url, "SLUICE_RATE_LIMIT": "off"}
        answers: list[str] = []
        turned_away: list[str] = []
        over = asyncio.Event()

        async def visit(client: ClientSession) -> None:
            while not over.is_set():
                status, text = await ask(client, url)
                (answers if status == 200 else turned_away).append(text)
                await asyncio.sleep(0.02)

        inherit = {"pass_fds": (listener.fileno(),)}
        async with session() as client, contextlib.AsyncExitStack() as servers:
            old = await servers.enter_async_context(Spawned(command, settings, **inherit))
            async with asyncio.timeout(40), asyncio.TaskGroup() as visitors:
                await old.listening()
                for _ in range(visitors_at_once):
                    visitors.create_task(visit(client))
                await asyncio.sleep(0.5)
                old.signal(signal.SIGTERM)
                assert await old.exited() == 0
                before = len(answers)
                new = await servers.enter_async_context(Spawned(command, settings, **inherit))
                await new.listening()
                await asyncio.sleep(0.5)
                over.set()
        assert len(answers) > before > 0
        assert all("data: [DONE]" in answer for answer in answers)
        assert all("shutting_down" in text for text in turned_away)
        assert len(turned_away) <= visitors_at_once


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Stands in for systemd: the socket that NOTIFY_SOCKET names."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        yield receiver


async def test_the_process_tells_systemd_how_it_is(
    manager: socket.socket, upstream: ScriptedUpstream, launch: Launch
) -> None:
    """READY=1 when it listens, WATCHDOG=1 at half of the interval, STOPPING=1 after SIGTERM."""
    loop = asyncio.get_running_loop()

    async def told() -> str:
        return (await loop.sock_recv(manager, 4096)).decode()

    server = await launch(LLM_BASE_URL=upstream.base_url, NOTIFY_SOCKET=manager.getsockname(), WATCHDOG_USEC="1000000")
    async with asyncio.timeout(20):
        states = [await told()]
        while "READY=1" not in states:
            states.append(await told())
        # Those before READY=1 do not count: some signs of life have to come while it serves.
        beats = [state for state in [await told(), await told(), await told()] if state == "WATCHDOG=1"]
        assert len(beats) == 3
        server.signal(signal.SIGTERM)
        while await told() != "STOPPING=1":
            pass
        assert await server.exited() == 0


# ---- The cage, without systemd: its seccomp filter, built by the library that systemd builds it with

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
EQUAL, MASKED_EQUAL = 4, 7
PROT_WRITE, PROT_EXEC = 2, 4


class Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def calls_of(names: str, need: Need) -> set[str]:
    """The system calls that a list of names and @groups stands for."""
    calls: set[str] = set()
    for name in names.split():
        if not name.startswith("@"):
            calls.add(name)
            continue
        listed = subprocess.run(
            [need("systemd-analyze"), "syscall-filter", "--no-pager", name], capture_output=True, text=True, check=True
        )
        members = [line.strip() for line in listed.stdout.splitlines()[1:]]
        calls |= calls_of(" ".join(member for member in members if not member.startswith("#")), need)
    return calls


@pytest.fixture
def cage(need: Need) -> Iterator[Callable[[], None]]:
    """Puts the process that calls it under the unit's SystemCallFilter, RestrictAddressFamilies and
    MemoryDenyWriteExecute."""
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        library = None
    if library is None:
        need("libseccomp.so.2")
        return
    allowed: set[str] = set()
    for names in directives(SERVICE)["SystemCallFilter"]:
        calls = calls_of(names.removeprefix("~"), need)
        allowed = allowed - calls if names.startswith("~") else allowed | calls
    assert only(SERVICE, "SystemCallErrorNumber") == "EPERM"
    assert only(SERVICE, "MemoryDenyWriteExecute") == "yes"

    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ERRNO | errno.EPERM)))

    def allow(call: str, *comparisons: Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # else this architecture has no such call
            array = (Comparison * len(comparisons))(*comparisons)
            assert library.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, len(comparisons), array) == 0

    for call in allowed - {"socket", "mmap", "mprotect", "pkey_mprotect", "shmat"}:
        allow(call)
    for family in only(SERVICE, "RestrictAddressFamilies").split():
        allow("socket", Comparison(0, EQUAL, getattr(socket, family), 0))
    allow("mmap", Comparison(2, MASKED_EQUAL, PROT_WRITE, 0))
    allow("mmap", Comparison(2, MASKED_EQUAL, PROT_EXEC, 0))
    allow("mprotect", Comparison(2, MASKED_EQUAL, PROT_EXEC, 0))

    def enter() -> None:
        # Runs in the child, before exec; the library sets no_new_privs, as the unit does.
        if library.seccomp_load(context) != 0:
            os._exit(99)

    yield enter
    library.seccomp_release(context)


CAGED = """
import errno, mmap, os, socket
for attempt in (
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
    lambda: os.chroot("/"),
    lambda: os.setpriority(os.PRIO_PROCESS, 0, 5),
):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemExit("not caged")
"""


async def test_the_server_works_in_its_cage(upstream: ScriptedUpstream, cage: Callable[[], None]) -> None:
    """Neither the interpreter nor a library needs what the unit takes away; a name is looked up in it, too."""
    caged = await asyncio.create_subprocess_exec(sys.executable, "-c", CAGED, preexec_fn=cage)
    assert await caged.wait() == 0
    base_url = upstream.base_url.replace("127.0.0.1", "localhost")
    command = [sys.executable, str(ROOT / "run.py")]
    async with Spawned(command, {"LLM_BASE_URL": base_url, "SLUICE_PORT": "0"}, preexec_fn=cage) as server:
        await server.listening()
        async with session() as client:
            status, text = await ask(client, server.url)
            assert status == 200
            assert "data: [DONE]" in text
            assert '"token"' in text
            async with client.get(server.url) as page:
                assert page.status == 200
        server.signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await server.exited() == 0
