"""Where the process listens: contract, section 2 (SLUICE_HOST, SLUICE_SOCKET, LISTEN_FDS) and row L7."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from server.settings import Settings, read_settings
from server.sockets import CannotListen, bind_admin, public_listener, url_of
from tests.sluice_process import free_port

PID: Final = str(os.getpid())
PASSED: Final = 200  # a descriptor that nothing else of the tests comes near


def settings(**environment: str) -> Settings:
    return read_settings({"SLUICE_PORT": "0"} | environment)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s.sock")


@pytest.fixture
def passed_descriptor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A number that is the test's to give away; 3 itself may be the test runner's (tests/test_process.py passes it)."""
    monkeypatch.setattr("server.sockets._FIRST_PASSED_DESCRIPTOR", PASSED)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), PASSED)  # taken, so that no socket of the test gets it by chance
    yield
    with contextlib.suppress(OSError):
        os.close(PASSED)


def pass_socket(sock: socket.socket) -> dict[str, str]:
    """Hand ``sock`` over as systemd does, and return what it puts into the environment (sd_listen_fds(3))."""
    os.dup2(sock.fileno(), PASSED)
    return {"LISTEN_PID": PID, "LISTEN_FDS": "1"}


def can_connect(listener: socket.socket) -> bool:
    with socket.socket(listener.family) as client:
        client.setblocking(True)
        return client.connect_ex(listener.getsockname()) == 0


# ---- Host and port


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("localhost", None)]
)
def test_it_listens_where_it_is_told(host: str, family: socket.AddressFamily | None) -> None:
    with public_listener(settings(SLUICE_HOST=host), {}) as listener:
        assert family in (None, listener.family)
        assert not listener.getblocking()
        assert can_connect(listener)
    assert listener.fileno() == -1


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_the_url_can_be_typed_into_a_browser(host: str, shown: str) -> None:
    with public_listener(settings(SLUICE_HOST=host), {}) as listener:
        assert url_of(listener) == f"{shown}{listener.getsockname()[1]}"


def test_a_port_in_use_is_refused_with_one_line() -> None:
    """Row L7: not shared, not stolen; told with host and port."""
    with public_listener(settings(), {}) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen) as caught, public_listener(settings(SLUICE_PORT=str(port)), {}):
            pass
    assert str(caught.value) == f"cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_a_port_is_free_again_at_once() -> None:
    """A restart need not wait for the TIME_WAIT of its connections."""
    with public_listener(settings(), {}) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.setblocking(True)
            listener.accept()[0].close()  # the server's side closes first, and so has the TIME_WAIT
    with public_listener(settings(SLUICE_PORT=str(port)), {}) as listener:
        assert can_connect(listener)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64 + ".example", "192.0.2.1", "999.1.1.1"])
def test_an_address_that_cannot_be_had_is_one_line(host: str) -> None:
    with pytest.raises(CannotListen) as caught, public_listener(settings(SLUICE_HOST=host), {}):
        pass
    assert str(caught.value).startswith(f"cannot listen on {host}")
    assert str(caught.value).isprintable()


def test_accepted_connections_hold_little_of_the_kernels_memory() -> None:
    """A reader who takes nothing, or has vanished: bounded in bytes and in time, by inheritance from the listener."""
    with (
        public_listener(settings(SLUICE_WRITE_TIMEOUT="7.5"), {}) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        listener.setblocking(True)
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65_536  # the kernel doubles it
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_375  # 1.25 x 7.5 s, and 1 s


def test_the_admin_port_is_its_own() -> None:
    port = free_port()
    admin = bind_admin(settings(SLUICE_ADMIN_PORT=str(port)))
    assert admin is not None
    with admin:
        assert admin.getsockname() == ("127.0.0.1", port)
        assert can_connect(admin)


def test_admin_port_0_is_off() -> None:
    """Section 2."""
    assert bind_admin(settings(SLUICE_ADMIN_PORT="0")) is None


def test_an_admin_port_in_use_is_refused() -> None:
    with public_listener(settings(), {}) as taken, pytest.raises(CannotListen, match="Address already in use"):
        bind_admin(settings(SLUICE_ADMIN_PORT=str(taken.getsockname()[1])))


# ---- The Unix socket


def test_a_unix_socket_is_instead_of_host_and_port(path: str) -> None:
    """Section 2; writable for its group, so that nginx can be let in, and for nobody else."""
    with public_listener(settings(SLUICE_SOCKET=path), {}) as listener:
        assert listener.family == socket.AF_UNIX
        assert url_of(listener) == f"unix:{path}"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        assert can_connect(listener)
    assert not os.path.exists(path)


def test_a_stale_socket_is_reclaimed(path: str) -> None:
    """Row L7: a killed process leaves one."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
        killed.listen()
    with public_listener(settings(SLUICE_SOCKET=path), {}) as listener:
        assert can_connect(listener)


@pytest.mark.parametrize("backlog", [8, 0], ids=["idle", "its queue full"])
def test_a_socket_in_use_is_refused(path: str, backlog: int) -> None:
    """Row L7: however busy its owner is, and without waiting for it."""
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(socket.socket(socket.AF_UNIX))
        owner.bind(path)
        owner.listen(backlog)
        for _ in range(backlog == 0):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        with (
            pytest.raises(CannotListen, match="Address already in use"),
            public_listener(settings(SLUICE_SOCKET=path), {}),
        ):
            pass
        assert os.path.exists(path)


def test_somebody_elses_datagram_socket_is_not_taken(path: str) -> None:
    """Such as /dev/log: no stream can be opened to it, but it is alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(CannotListen), public_listener(settings(SLUICE_SOCKET=path), {}):
            pass
        assert os.path.exists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "link to nothing"])
def test_nothing_but_a_socket_is_ever_deleted(path: str, kind: str, tmp_path: Path) -> None:
    """Row L7: a mistyped path must not cost a file."""
    target = tmp_path / "target"
    match kind:
        case "file":
            Path(path).write_text("precious")
        case "directory":
            Path(path).mkdir()
        case "link to a file":
            target.write_text("precious")
            Path(path).symlink_to(target)
        case _:
            Path(path).symlink_to(target)
    before = os.lstat(path)
    with pytest.raises(CannotListen, match="Address already in use"), public_listener(settings(SLUICE_SOCKET=path), {}):
        pass
    assert os.lstat(path).st_ino == before.st_ino
    assert not target.exists() or target.read_text() == "precious"


@pytest.mark.parametrize("path", ["/nowhere/s.sock", "/proc/s.sock", "/"])
def test_a_path_that_cannot_be_had_is_one_line(path: str) -> None:
    with pytest.raises(CannotListen) as caught, public_listener(settings(SLUICE_SOCKET=path), {}):
        pass
    assert str(caught.value).startswith(f"cannot listen on {path}: ")


def test_a_path_that_another_process_has_taken_over_is_left_to_it(path: str) -> None:
    """While we drain our listener is closed, and our path counts as stale to whoever starts meanwhile."""
    with socket.socket(socket.AF_UNIX) as successor:
        with public_listener(settings(SLUICE_SOCKET=path), {}) as listener:
            listener.close()
            os.unlink(path)
            successor.bind(path)
            successor.listen()
        assert os.path.exists(path)
        assert can_connect(successor)


def test_a_path_that_has_gone_meanwhile_is_no_failure(path: str) -> None:
    with public_listener(settings(SLUICE_SOCKET=path), {}):
        os.unlink(path)


def test_an_owner_may_be_given_to_the_socket_while_it_serves(path: str) -> None:
    """chmod and chown change the file, not whose it is: it goes at the end."""
    with public_listener(settings(SLUICE_SOCKET=path), {}):
        os.chmod(path, 0o666)
    assert not os.path.exists(path)


# ---- What systemd passes


@pytest.mark.usefixtures("passed_descriptor")
def test_a_passed_socket_wins_over_socket_host_and_port(path: str) -> None:
    """Section 2: LISTEN_FDS wins over both."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        environment = pass_socket(passed)
        with public_listener(settings(SLUICE_SOCKET=path), environment) as listener:
            assert listener.getsockname() == passed.getsockname()
            assert can_connect(listener)
            assert not os.get_inheritable(listener.fileno())
        assert not os.path.exists(path)
        assert can_connect(passed)  # systemd's own copy goes on: a restart refuses no connection


@pytest.mark.usefixtures("passed_descriptor")
def test_a_passed_unix_socket_keeps_its_name(path: str) -> None:
    """It is systemd's: it passes it again to the next process."""
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(path)
        passed.listen()
        with public_listener(settings(SLUICE_SOCKET=path), pass_socket(passed)) as listener:
            assert url_of(listener) == f"unix:{path}"
        assert os.path.exists(path)
        assert can_connect(passed)


@pytest.mark.usefixtures("passed_descriptor")
@pytest.mark.parametrize(
    "environment",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},  # meant for another process, whose environment we inherited
        {"LISTEN_PID": PID},
        {"LISTEN_PID": PID, "LISTEN_FDS": "0"},
        {"LISTEN_PID": PID, "LISTEN_FDS": ""},
        {"LISTEN_PID": PID, "LISTEN_FDS": "x"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "-1"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "\u0661"},
    ],
    ids=lambda environment: str(environment).replace(PID, "ours"),  # a test's name is the same in each process
)
def test_what_is_not_passed_to_us_is_not_taken(environment: dict[str, str]) -> None:
    """sd_listen_fds(3)."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        pass_socket(passed)
        with public_listener(settings(), environment) as listener:
            assert listener.getsockname() != passed.getsockname()


@pytest.mark.usefixtures("passed_descriptor")
@pytest.mark.parametrize("passed", ["nothing", "a file", "a connection"])
def test_a_passed_descriptor_that_is_no_listener_is_one_line(passed: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if passed == "nothing":
            os.close(PASSED)
        elif passed == "a file":
            os.dup2(stack.enter_context((tmp_path / "file").open("w")).fileno(), PASSED)
        elif passed == "a connection":  # Accept=yes in the .socket unit
            one, other = socket.socketpair()
            stack.enter_context(other)
            os.dup2(stack.enter_context(one).fileno(), PASSED)
        with pytest.raises(CannotListen) as caught, public_listener(settings(), {"LISTEN_PID": PID, "LISTEN_FDS": "1"}):
            pass
    assert str(caught.value).startswith("cannot listen on the passed descriptor 3: ")
