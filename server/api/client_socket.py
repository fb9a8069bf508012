"""The socket of a client: how much it has not taken, and its end."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from typing import Final

from aiohttp.base_protocol import BaseProtocol

__all__ = ["ClientSocket"]

_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, for 0 s (socket(7))


class ClientSocket:
    """What the ``Connection`` of server/relay/viewer.py is asked beside writing. ``protocol`` is aiohttp's; it knows no
    transport any more once the client has gone."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: BaseProtocol) -> None:
        self._protocol = protocol

    def untaken_bytes(self) -> int:
        transport = self._protocol.transport
        if transport is None or (sock := transport.get_extra_info("socket")) is None:
            return 0
        return transport.get_write_buffer_size() + _send_queue_bytes(sock.fileno())

    def abort(self) -> None:
        if self._protocol.transport is not None:
            self._protocol.transport.abort()

    def reset(self) -> None:
        transport = self._protocol.transport
        if transport is not None and (sock := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.abort()


def _send_queue_bytes(descriptor: int) -> int:
    """Bytes in the kernel's send queue that the peer has not acknowledged (SIOCOUTQ, tcp(7) and unix(7)).

    Without it a slow reader looks like a dead one: our own buffer moves only when a third of the kernel's is free.
    """
    try:
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # closed meanwhile
        return 0
    return int(struct.unpack("i", answer)[0])
