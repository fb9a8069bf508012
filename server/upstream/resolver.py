"""Name look-ups that nothing has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["DaemonResolver"]


class DaemonResolver(AbstractResolver):
    """Runs each look-up of the system's resolver in a daemon thread of its own.

    aiohttp's own resolver uses the loop's thread pool, and the end of the process joins that pool: a name server that
    does not answer would hold up a stop for as long as the system's resolver is patient, half a minute and more. The
    number of threads needs no bound here, since the connector lets all requests for one name wait for one look-up.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host``. Raises OSError where there are none."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[ResolveResult]] = loop.create_future()

        def tell(result: list[ResolveResult] | OSError) -> None:
            if found.done():
                return
            if isinstance(result, OSError):
                found.set_exception(result)
            else:
                found.set_result(result)

        def look_up() -> None:
            result: list[ResolveResult] | OSError
            try:
                result = _look_up(host, port, family)
            except OSError as exc:
                result = exc
            except UnicodeError:  # a label of 64 characters, or an empty one
                result = OSError("no host name")
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(tell, result)

        threading.Thread(target=look_up, name=f"look up {host}", daemon=True).start()
        return await found

    async def close(self) -> None:
        """Nothing is held open."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    infos = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host,
            host=str(address[0]),
            port=int(address[1]),
            family=found_family,
            proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for found_family, _, protocol, _, address in infos
    ]
