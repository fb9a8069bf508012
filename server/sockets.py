"""Where the process listens: a port, a Unix socket, or what systemd passed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from typing import Final

from server.settings import Settings

__all__ = ["BACKLOG", "CannotListen", "bind_admin", "public_listener", "url_of"]

BACKLOG: Final = 4096  # a storm of reconnecting browsers; the kernel caps it at net.core.somaxconn

_FIRST_PASSED_DESCRIPTOR: Final = 3  # sd_listen_fds(3)

# Kernel memory that one reader who takes nothing can hold; the kernel doubles it. The default grows to megabytes.
_SEND_BUFFER: Final = 64 << 10


class CannotListen(OSError):
    """The address cannot be had; ``str()`` is the line for the operator."""


@contextlib.contextmanager
def public_listener(settings: Settings, environment: Mapping[str, str]) -> Iterator[socket.socket]:
    """The public listener: systemd's socket if there is one, else the Unix socket, else host and port.

    Closed at the end, and the name of a Unix socket goes with it, if it is ours: not systemd's, nor that of another
    process which has taken our place meanwhile. Raises CannotListen.
    """
    with contextlib.ExitStack() as stack:
        if _is_passed(environment):
            listener = _take_passed()
        elif settings.socket:
            listener = _bind_unix(settings.socket)
            stack.callback(_unlink_if_same, settings.socket, _identity(settings.socket))
        else:
            listener = _bind_tcp(settings.host, settings.port)
        with listener:
            _tune(listener, settings.write_timeout)
            yield listener


def bind_admin(settings: Settings) -> socket.socket | None:
    """The admin listener, or None where it is switched off. Raises CannotListen."""
    return _bind_tcp(settings.admin_host, settings.admin_port) if settings.admin_port else None


def url_of(listener: socket.socket) -> str:
    """What a person would type to reach it."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tune(listener: socket.socket, write_timeout: float) -> None:
    """Options that accepted connections inherit from the listening socket."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if listener.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux has it, macOS does not
        # A client that vanished without a FIN, or that takes nothing after its answer has ended: the kernel gives up
        # on it soon after we would, who can tell why. Its own limit is a quarter of an hour, for a closed window none.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round((1.25 * write_timeout + 1) * 1000))


def _is_passed(environment: Mapping[str, str]) -> bool:
    count = environment.get("LISTEN_FDS", "")
    return environment.get("LISTEN_PID") == str(os.getpid()) and bool(re.fullmatch("0*[1-9][0-9]*", count))


def _take_passed() -> socket.socket:
    try:
        listener = socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR)
        listener.set_inheritable(False)  # systemd passed it to us, not to our children
    except OSError as exc:
        raise CannotListen(f"cannot listen on the passed descriptor 3: {exc.strerror}") from exc
    return _listen(listener, "the passed descriptor 3")


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except UnicodeError as exc:  # a label of 64 characters, or an empty one
        raise CannotListen(f"cannot listen on {host}: it is no host name") from exc
    except OSError as exc:
        raise CannotListen(f"cannot listen on {host}: {exc.strerror or exc}") from exc
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as exc:  # a kernel or a sandbox without IPv6
        raise CannotListen(f"cannot listen on {host}: {exc.strerror or exc}") from exc
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT
    return _listen(listener, f"{host} port {port}", address)


def _bind_unix(path: str) -> socket.socket:
    """Bind ``path``, in place of a socket that a killed process left there, but not of one that is in use."""
    if _is_stale(path):
        with contextlib.suppress(OSError):
            os.unlink(path)
    return _listen(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path, path)


def _listen(listener: socket.socket, name: str, address: str | tuple[object, ...] | None = None) -> socket.socket:
    """Bind it, where there is an address, and listen at once: another process that starts now must find it in use."""
    try:
        if address is not None:
            listener.bind(address)
            if listener.family == socket.AF_UNIX:
                os.chmod(name, 0o660)  # before anybody can connect
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise CannotListen(f"cannot listen on {name}: {exc.strerror or exc}") from exc
    return listener


def _is_stale(path: str) -> bool:
    """Whether a socket is there to which nobody listens any more; anything else (a full queue, too) is not ours."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # else it would wait for a place in a full queue
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int, int] | None:
    """What tells a socket's name from a later one: inode numbers are used again, so its time of birth, too."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _unlink_if_same(path: str, identity: tuple[int, int, int] | None) -> None:
    if identity is not None and _identity(path) == identity:
        with contextlib.suppress(OSError):
            os.unlink(path)
