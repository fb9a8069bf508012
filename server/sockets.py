"""Where the process listens: a port, a Unix socket, or what systemd passed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Mapping
from typing import Final

from server.settings import Settings

__all__ = ["CannotListen", "bind_admin", "bind_public", "close_listener", "url_of"]

_FIRST_PASSED_DESCRIPTOR: Final = 3  # sd_listen_fds(3)

# Kernel memory that one reader who takes nothing can hold; the kernel doubles it. The default grows to megabytes.
_SEND_BUFFER: Final = 64 << 10


class CannotListen(OSError):
    """The address cannot be had; ``str()`` is the line for the operator."""


def bind_public(settings: Settings, environment: Mapping[str, str]) -> socket.socket:
    """The public listener: systemd's socket if there is one, else the Unix socket, else host and port.

    Raises CannotListen.
    """
    if environment.get("LISTEN_PID") == str(os.getpid()) and int(environment.get("LISTEN_FDS", "0")) >= 1:
        listener = socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR)
    elif settings.socket:
        listener = _bind_unix(settings.socket)
    else:
        listener = _bind_tcp(settings.host, settings.port)
    _tune(listener, settings.write_timeout)
    return listener


def bind_admin(settings: Settings) -> socket.socket | None:
    """The admin listener, or None where it is switched off. Raises CannotListen."""
    return _bind_tcp(settings.admin_host, settings.admin_port) if settings.admin_port else None


def url_of(listener: socket.socket) -> str:
    """What a person would type to reach it."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def close_listener(listener: socket.socket, settings: Settings) -> None:
    """Close it, and take our own Unix socket's name away (never one that systemd owns)."""
    ours = listener.family == socket.AF_UNIX and listener.getsockname() == settings.socket
    listener.close()
    if ours:
        with contextlib.suppress(OSError):
            os.unlink(settings.socket)


def _tune(listener: socket.socket, write_timeout: float) -> None:
    """Options that accepted connections inherit from the listening socket."""
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if listener.family != socket.AF_UNIX:
        # A client that vanished without a FIN, or that takes nothing after its answer has ended: the kernel gives up
        # on it after the same time as we do. Its own limit is a quarter of an hour, for a closed window none at all.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(write_timeout * 1000))


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as exc:
        raise CannotListen(f"cannot listen on {host}: {exc.strerror or exc}") from exc
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT
        listener.bind(address)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise CannotListen(f"cannot listen on {host} port {port}: {exc.strerror}") from exc
    return listener


def _bind_unix(path: str) -> socket.socket:
    """Bind ``path``, in place of a socket that a killed process left there, but not of one that is in use."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o660)
    except OSError as exc:
        listener.close()
        raise CannotListen(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return listener


def _is_stale(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) != 0
