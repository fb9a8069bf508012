"""Who the client is: the peer, or whom a trusted proxy names."""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import Final

from aiohttp import web

from server.api.keys import EXCHANGE, SETTINGS
from server.settings import TrustedProxies

__all__ = ["client_of", "find_client", "from_trusted_proxy"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNIX: Final = "unix"  # every peer on a Unix socket
GONE: Final = "gone"  # every peer that had reset its connection before the kernel was asked for its address

# Some proxies write the client's port too: 203.0.113.7:41000, [2001:db8::1]:41000
_WITH_PORT: Final = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


def find_client(request: web.Request) -> None:
    """Note whom the limits count for."""
    peer, headers = peer_of(request), request.headers
    if "X-Forwarded-For" in headers or "X-Real-IP" in headers:
        trusted = request.app[SETTINGS].trusted_proxies
        client = client_of(peer, headers.getall("X-Forwarded-For", []), headers.get("X-Real-IP"), trusted)
    else:
        client = _name_of_peer(peer)
    request[EXCHANGE].client = client


def from_trusted_proxy(request: web.Request) -> bool:
    """Whether the peer is one whose X-Forwarded headers count."""
    return _is_trusted(peer_of(request), request.app[SETTINGS].trusted_proxies)


def peer_of(request: web.Request) -> str:
    """The address at the other end of the socket; ``unix`` for a Unix socket, whose name is a string, if an empty one.

    The kernel hands out the request of a connection that has been reset, but no address: nothing may be believed of
    such a peer, and all of them are one.
    """
    peer = request.protocol.peername  # which asks the kernel once a connection
    if peer is None:
        return GONE
    return str(peer[0]) if isinstance(peer, tuple) else UNIX


def client_of(peer: str, forwarded_for: list[str], real_ip: str | None, trusted: TrustedProxies) -> str:
    """The client as limits name it: an IPv4 address, an IPv6 /64, ``unix`` or ``gone``.

    Behind a trusted peer it is the right-most untrusted address of X-Forwarded-For (the left-most one where all are
    trusted), or X-Real-IP where there is none; garbage there counts as the proxy itself.
    """
    if not _is_trusted(peer, trusted):
        return _name_of_peer(peer)
    named: Address | None = None
    hops = [hop.strip() for line in forwarded_for for hop in line.split(",")]
    if hops:
        for hop in reversed(hops):
            named = _parse(hop)
            if named is None or named not in trusted:
                break
    elif real_ip is not None:
        named = _parse(real_ip.strip())
    return _name(named) or _name_of_peer(peer)


def _is_trusted(peer: str, trusted: TrustedProxies) -> bool:
    if peer == UNIX:
        return trusted.unix
    address = _parse(peer)
    return address is not None and address in trusted


@functools.lru_cache(maxsize=4096)  # a proxy's own address comes with every request
def _parse(text: str) -> Address | None:
    if match := _WITH_PORT.fullmatch(text):
        text = match[1] or match[2]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@functools.lru_cache(maxsize=4096)
def _name_of_peer(peer: str) -> str:
    return _name(_parse(peer)) or peer


@functools.lru_cache(maxsize=4096)
def _name(address: Address | None) -> str | None:
    """One IPv6 customer has a whole /64: by single address a client would have 2^64 buckets."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return None if address is None else str(address)
