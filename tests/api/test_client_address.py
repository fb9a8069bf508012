"""Whom the limits count for: the peer, or whom a trusted proxy names (contract, §8; rows S1 to S3)."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from pathlib import Path

import pytest

from server.api.middleware.client_address import client_of
from server.settings import TrustedProxies, read_settings
from tests.api.conftest import Connect, LogLines
from tests.api.observing import until
from tests.api.raw_client import request
from tests.api.returning import RESUMABLE
from tests.conftest import Serve


def _trusting(*networks: str) -> TrustedProxies:
    return TrustedProxies(tuple(ipaddress.ip_network(network) for network in networks), "unix" in networks)


PROXIES = _trusting("127.0.0.0/8", "::1/128", "10.0.0.0/8", "2001:db8:ffff::/48")

CHAINS = {
    "one address": (["203.0.113.7"], None, "203.0.113.7"),
    "the right-most counts, the rest is the client's word": (["6.6.6.6, 203.0.113.7"], None, "203.0.113.7"),
    "trusted ones on the right are passed": (["6.6.6.6, 203.0.113.7, 10.1.2.3, 127.0.0.1"], None, "203.0.113.7"),
    "several lines are one list": (["6.6.6.6", "203.0.113.7", "10.0.0.1"], None, "203.0.113.7"),
    "spaces or none": (["6.6.6.6,203.0.113.7 ,\t10.0.0.1"], None, "203.0.113.7"),
    "all trusted: the left-most": (["10.0.0.1, 10.0.0.2"], None, "10.0.0.1"),
    "with a port": (["203.0.113.7:41000"], None, "203.0.113.7"),
    "IPv6 per /64": (["2001:db8:1:2:3:4:5:6"], None, "2001:db8:1:2::/64"),
    "IPv6 in brackets": (["[2001:db8:1:2::9]"], None, "2001:db8:1:2::/64"),
    "IPv6 in brackets with a port": (["[2001:db8:1:2::9]:80"], None, "2001:db8:1:2::/64"),
    "IPv6 with a zone": (["fe80::1%eth0"], None, "fe80::/64"),
    "a trusted IPv6 proxy": (["203.0.113.7, 2001:db8:ffff::1"], None, "203.0.113.7"),
    "mapped IPv4 is IPv4": (["::ffff:203.0.113.7"], None, "203.0.113.7"),
    "mapped IPv4 of a trusted proxy": (["203.0.113.7, ::ffff:10.0.0.1"], None, "203.0.113.7"),
    "X-Real-IP where there is no chain": ([], "203.0.113.7", "203.0.113.7"),
    "X-Real-IP as IPv6": ([], "2001:db8:1:2::9", "2001:db8:1:2::/64"),
    "the chain wins over X-Real-IP": (["203.0.113.7"], "6.6.6.6", "203.0.113.7"),
    "neither": ([], None, "127.0.0.1"),
    "garbage is the proxy itself": (["unknown"], None, "127.0.0.1"),
    "garbage on the right hides what stands left of it": (["6.6.6.6, unknown"], None, "127.0.0.1"),
    "garbage left of a trusted one": (["6.6.6.6, _hidden, 10.0.0.1"], None, "127.0.0.1"),
    "an empty element": (["6.6.6.6, "], None, "127.0.0.1"),
    "an empty header": ([""], None, "127.0.0.1"),
    "an empty header does not open X-Real-IP": ([""], "6.6.6.6", "127.0.0.1"),
    "garbage in X-Real-IP": ([], "not an address", "127.0.0.1"),
    "a list in X-Real-IP": ([], "6.6.6.6, 7.7.7.7", "127.0.0.1"),
    "no octal, no hex": (["0177.0.0.1"], None, "127.0.0.1"),
    "a number is no address": (["3232235777"], None, "127.0.0.1"),
    "digits of another script": (["\uff11.2.3.4"], None, "127.0.0.1"),
    "a network is no address": (["203.0.113.0/24"], None, "127.0.0.1"),
    "a line end": (["203.0.113.7\n"], None, "203.0.113.7"),
}


@pytest.mark.parametrize(("forwarded_for", "real_ip", "client"), CHAINS.values(), ids=CHAINS.keys())
def test_a_trusted_proxy_names_the_client(forwarded_for: list[str], real_ip: str | None, client: str) -> None:
    """The right-most untrusted address of X-Forwarded-For, or X-Real-IP where there is none."""
    assert client_of("127.0.0.1", forwarded_for, real_ip, PROXIES) == client


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
    ],
)
def test_an_untrusted_peer_is_the_client_whatever_it_says(peer: str, client: str) -> None:
    """Row S1."""
    assert client_of(peer, ["6.6.6.6"], "7.7.7.7", PROXIES) == client


def test_a_trusted_unix_socket_may_name_the_client() -> None:
    """``unix`` is trusted by default: that is where a proxy on the same machine comes from."""
    trusted = read_settings({}).trusted_proxies
    assert client_of("unix", ["203.0.113.7"], None, trusted) == "203.0.113.7"
    assert client_of("unix", ["garbage"], None, trusted) == "unix"
    assert client_of("unix", [], None, trusted) == "unix"


def test_a_mapped_peer_is_trusted_as_its_ipv4() -> None:
    """A listener on ``::`` sees its IPv4 proxies so."""
    assert client_of("::ffff:127.0.0.1", ["203.0.113.7"], None, PROXIES) == "203.0.113.7"


def test_a_long_chain_is_read_quickly() -> None:
    """Row S2: 10^4 elements within a millisecond or so (here 50, on a machine that does other things too)."""
    lines = [", ".join(["6.6.6.6"] * 1000)] * 10
    began_at = time.perf_counter()
    assert client_of("127.0.0.1", lines, None, PROXIES) == "6.6.6.6"
    assert time.perf_counter() - began_at < 0.05


# ---- Over real sockets


async def _client_seen(serve: Serve, connect: Connect, lines: LogLines, trusted: str, *headers: str) -> object:
    client = await connect(await serve(SLUICE_TRUSTED_PROXIES=trusted))
    assert (await client.ask(request("/api/stream", *headers))).status == 400
    return lines("request")[-1]["client"]


FORGED = [
    "X-Forwarded-For: 6.6.6.6",
    "X-Real-IP: 6.6.6.6",
    "Forwarded: for=6.6.6.6",
    "True-Client-IP: 6.6.6.6",
    "CF-Connecting-IP: 6.6.6.6",
    "X-Client-IP: 6.6.6.6",
]


@pytest.mark.parametrize("header", FORGED)
async def test_who_is_no_trusted_proxy_names_nobody(
    serve: Serve, connect: Connect, lines: LogLines, header: str
) -> None:
    """Row S1: from a peer outside SLUICE_TRUSTED_PROXIES such headers are just words."""
    assert await _client_seen(serve, connect, lines, "10.0.0.0/8", header) == "127.0.0.1"


@pytest.mark.parametrize("header", FORGED[2:])
async def test_a_trusted_proxy_speaks_by_two_headers_only(
    serve: Serve, connect: Connect, lines: LogLines, header: str
) -> None:
    """Others pass through a proxy untouched, so they are still the client's words."""
    assert await _client_seen(serve, connect, lines, "127.0.0.0/8", header) == "127.0.0.1"


async def test_lines_of_one_header_are_one_chain(serve: Serve, connect: Connect, lines: LogLines) -> None:
    seen = await _client_seen(
        serve,
        connect,
        lines,
        "127.0.0.0/8,10.0.0.0/8",
        "X-Forwarded-For: 6.6.6.6",
        "X-Forwarded-For: 7.7.7.7, 10.0.0.1",
    )
    assert seen == "7.7.7.7"


async def test_a_forged_address_is_no_second_bucket(serve: Serve, connect: Connect) -> None:
    """Rows S1, S20: the limit counts for the peer."""
    client = await connect(await serve(SLUICE_TRUSTED_PROXIES="10.0.0.0/8", SLUICE_RATE_LIMIT="1/3600"))
    statuses = [
        (
            await client.ask(
                request("/api/stream?q=hi", f"X-Forwarded-For: 203.0.113.{n}", f"X-Real-IP: 198.51.100.{n}")
            )
        ).status
        for n in range(3)
    ]
    assert statuses == [200, 429, 429]


async def test_who_resets_at_once_is_not_taken_for_a_trusted_peer(serve: Serve, lines: LogLines) -> None:
    """Rows S1, S20: the kernel hands out what came before the reset, but has no address any more; on a Unix socket,
    which is trusted, it has none either."""
    server = await serve(SLUICE_TRUSTED_PROXIES="10.0.0.0/8,unix", SLUICE_RATE_LIMIT="1/3600")
    for number in range(50):
        with socket.create_connection(("127.0.0.1", server.port)) as gone:  # the server does not run meanwhile
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.sendall(request("/api/stream?q=hi", f"X-Forwarded-For: 203.0.113.{number}", RESUMABLE))
    await until(lambda: len(lines("request")) == 50, within=5)
    assert {line["client"] for line in lines("request")} == {"gone"}
    assert len(lines("stream_end")) <= 1


async def test_a_forged_prefix_of_the_chain_is_no_second_bucket(serve: Serve, connect: Connect) -> None:
    """Row S2: what a client sends stands left of what the proxy adds."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    statuses = [
        (await client.ask(request("/api/stream?q=hi", f"X-Forwarded-For: 6.6.6.{n}, 203.0.113.7"))).status
        for n in range(3)
    ]
    assert statuses == [200, 429, 429]


async def test_an_ipv6_client_has_one_bucket_for_its_64(serve: Serve, connect: Connect) -> None:
    """Row S20: one customer has 2^64 addresses, and one bucket."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    statuses = [
        (await client.ask(request("/api/stream?q=hi", f"X-Forwarded-For: {address}"))).status
        for address in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1")
    ]
    assert statuses == [200, 429, 200]


@pytest.mark.parametrize(
    ("trusted", "client"), [("unix", "203.0.113.7"), ("127.0.0.0/8", "unix")], ids=["trusted", "not trusted"]
)
async def test_a_unix_socket_is_one_peer(
    serve: Serve,
    connect: Connect,
    lines: LogLines,
    tmp_path: Path,
    trusted: str,
    client: str,
) -> None:
    """``unix`` in SLUICE_TRUSTED_PROXIES: whoever may open the socket may name the client."""
    path = str(tmp_path / "sluice.sock")
    await serve(SLUICE_SOCKET=path, SLUICE_TRUSTED_PROXIES=trusted)
    response = await (await connect(path)).ask(request("/api/stream?q=hi", "X-Forwarded-For: 203.0.113.7"))
    assert (response.status, response.complete) == (200, True)
    assert lines("request")[0]["client"] == lines("stream_end")[0]["client"] == client


async def test_an_ipv6_peer_is_served(serve: Serve, connect: Connect, lines: LogLines) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = await serve(SLUICE_HOST="::1", SLUICE_TRUSTED_PROXIES="")
    client = await connect(server, host="::1")
    assert (await client.ask()).status == 200
    assert lines("request")[-1]["client"] == "::/64"
