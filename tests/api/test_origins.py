"""Which pages may ask: origins, CORS headers, preflights (contract, §3; rows S4, S5)."""

from __future__ import annotations

import aiohttp
import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.raw_client import RawClient, Response, request
from tests.conftest import Serve
from tests.upstream_sim import Call, ScriptedUpstream

LISTED = "https://good.example"
EXPOSED = {"RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID", "Location"}


def _vary(response: Response) -> set[str]:
    return {name.strip().lower() for value in response.headers.getall("Vary", []) for name in value.split(",")}


def _cors_headers(response: Response) -> set[str]:
    return {name for name in response.headers if name.lower().startswith("access-control-")}


async def _ask(client: RawClient, *headers: str) -> Response:
    return await client.ask(request("/api/stream?q=hi", *headers))


# ---- Who may ask


@pytest.mark.parametrize("host", ["sluice.test", "sluice.test:4001", "SLUICE.test", "127.0.0.1:4001", "[::1]:4001"])
async def test_our_own_page_may_ask(serve: Serve, connect: Connect, host: str) -> None:
    """Same origin is the Host that the request came to."""
    client = await connect(await serve())
    response = await _ask(client, f"Host: {host}", f"Origin: http://{host.lower()}")
    assert response.status == 200


@pytest.mark.parametrize(
    ("trusted", "forwarded", "origin", "status"),
    [
        ("127.0.0.1", "https", "https://sluice.test", 200),
        ("127.0.0.1", "HTTPS", "https://sluice.test", 200),
        ("127.0.0.1", "http, https", "https://sluice.test", 200),
        ("127.0.0.1", "https", "http://sluice.test", 403),
        ("127.0.0.1", "gopher", "gopher://sluice.test", 403),
        ("127.0.0.1", None, "https://sluice.test", 403),
        ("10.0.0.0/8", "https", "https://sluice.test", 403),
        ("10.0.0.0/8", "https", "http://sluice.test", 200),
        ("", "https", "https://sluice.test", 403),
    ],
)
async def test_the_scheme_is_what_a_trusted_proxy_says(
    serve: Serve, connect: Connect, trusted: str, forwarded: str | None, origin: str, status: int
) -> None:
    """ "scheme by ``X-Forwarded-Proto`` of a trusted proxy", and of nobody else."""
    client = await connect(await serve(SLUICE_TRUSTED_PROXIES=trusted))
    headers = [f"X-Forwarded-Proto: {forwarded}"] if forwarded else []
    assert (await _ask(client, f"Origin: {origin}", *headers)).status == status


@pytest.mark.parametrize(
    ("proto", "host", "origin"),
    [("https", "sluice.test:443", "https://sluice.test"), ("http", "sluice.test:80", "http://sluice.test")],
)
async def test_a_default_port_in_host_is_the_same_origin(
    serve: Serve, connect: Connect, proto: str, host: str, origin: str
) -> None:
    """A proxy may write ``$host:$server_port``; a browser never writes its scheme's own port into an Origin."""
    client = await connect(await serve())
    response = await _ask(client, f"Host: {host}", f"X-Forwarded-Proto: {proto}", f"Origin: {origin}")
    assert response.status == 200


@pytest.mark.parametrize("host", ["", "[", "[::1", "a:99999", "a b", "a@b", ":80", "..", "%41", "a,a", "é" * 300])
async def test_an_odd_host_is_no_origin_and_no_failure(
    serve: Serve, connect: Connect, lines: LogLines, host: str
) -> None:
    client = await connect(await serve())
    response = await _ask(client, f"Host: {host}", "Origin: http://a")
    assert response.status in (400, 403)
    assert lines.failures == []


async def test_who_names_no_origin_may_ask(serve: Serve, connect: Connect) -> None:
    """curl, or the page itself: browsers leave Origin out of a same-origin GET."""
    client = await connect(await serve())
    for headers in ((), ("Sec-Fetch-Site: same-origin",), ("Sec-Fetch-Site: none",)):
        response = await _ask(client, *headers)
        assert response.status == 200
        assert _cors_headers(response) == set()
        assert "origin" in _vary(response)


STRANGERS = [
    "https://evil.example",
    "null",
    "http://good.example",
    "https://good.example.evil.example",
    "https://good.example:8443",
    "https://good.example:443",
    "https://GOOD.example",
    "https://good.example/",
    "https://sub.good.example",
    "https://good.exampleevil",
    "good.example",
    "https://good.example, https://evil.example",
    "*",
    "",
    "https://sluice.test",
    "http://sluice.test:81",
    "http://sluice.test.evil.example",
]


@pytest.mark.parametrize("origin", STRANGERS)
async def test_another_origin_is_refused_before_anything_is_spent(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, origin: str
) -> None:
    """Rows S4, S5: only an exact match. No CORS headers, no upstream call, no token of the bucket."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED, SLUICE_RATE_LIMIT="1/3600"))
    response = await _ask(client, f"Origin: {origin}")
    assert (response.status, response.error) == (403, "origin_not_allowed")
    assert _cors_headers(response) == set()
    assert "origin" in _vary(response)
    assert "RateLimit" not in response.headers
    assert upstream.calls == []
    assert (await _ask(client)).status == 200


@pytest.mark.parametrize("target", ["/api/stream?q=hi", "/%61pi/stream?q=hi", "/api/nothing", "/api/stream"])
async def test_no_spelling_of_the_path_goes_round_the_origin(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, target: str
) -> None:
    client = await connect(await serve())
    response = await client.ask(request(target, "Origin: https://evil.example"))
    assert (response.status, response.error) == (403, "origin_not_allowed")
    assert upstream.calls == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_request_of_another_site_without_an_origin_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, site: str
) -> None:
    """Row S4: an ``<img>`` or a link of another page sends no Origin; ``Sec-Fetch-Site`` tells."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await _ask(client, f"Sec-Fetch-Site: {site}")
    assert (response.status, response.error) == (403, "origin_not_allowed")
    assert upstream.calls == []


# ---- What a listed page may read


ANSWERS = {
    "200": ([], "/api/stream?q=hi", "GET", 200),
    "400": ([], "/api/stream?q=", "GET", 400),
    "404": ([], "/api/nothing", "GET", 404),
    "404 to a POST": ([], "/api/nothing", "POST", 404),
    "405": ([], "/api/stream?q=hi", "POST", 405),
    "405 to HEAD": ([], "/api/stream?q=hi", "HEAD", 405),
    "429": (["/api/stream?q=hi"], "/api/stream?q=hi", "GET", 429),
}


@pytest.mark.parametrize(("before", "target", "method", "status"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_listed_page_may_read_every_answer(
    serve: Serve, connect: Connect, before: list[str], target: str, method: str, status: int
) -> None:
    """ "CORS headers for a listed origin stand on every answer under /api, refusals too", and expose what it needs."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS=f"https://other.example,{LISTED}", SLUICE_RATE_LIMIT="1/60"))
    for earlier in before:
        await client.ask(request(earlier))
    response = await client.ask(request(target, f"Origin: {LISTED}", method=method))
    assert response.status == status
    assert response.headers.getall("Access-Control-Allow-Origin") == [LISTED]
    exposed = {name.strip() for name in response.headers["Access-Control-Expose-Headers"].split(",")}
    assert exposed == EXPOSED
    assert "origin" in _vary(response)


async def test_a_listed_page_may_read_that_all_places_are_taken(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """The same for 429 too_many_streams and 503 overloaded."""

    async def hold(call: Call) -> None:
        await call.gone()

    upstream.script = hold
    server = await serve(
        SLUICE_CORS_ORIGINS=LISTED, SLUICE_MAX_STREAMS="2", SLUICE_MAX_STREAMS_PER_CLIENT="1", SLUICE_RATE_LIMIT="off"
    )
    clients = [await connect(server) for _ in range(3)]
    for client, address in zip(clients, ("1.1.1.1", "2.2.2.2"), strict=False):
        await client.send(request("/api/stream?q=hi", f"X-Forwarded-For: {address}"))
        await client.read_until(b"event: start")
    for address, code in (("1.1.1.1", "too_many_streams"), ("3.3.3.3", "overloaded")):
        response = await _ask(clients[2], f"X-Forwarded-For: {address}", f"Origin: {LISTED}")
        assert response.error == code
        assert response.headers["Access-Control-Allow-Origin"] == LISTED
        assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]
    for client in clients:
        client.close()
    await settled(server)


async def test_a_listed_page_may_send_its_login(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await _ask(client, f"Origin: {LISTED}", "Cookie: a=b")
    assert response.headers["Access-Control-Allow-Credentials"] == "true"


@pytest.mark.parametrize("origin", ["https://any.example", "null"])
async def test_a_star_lets_every_page_ask_but_no_login_along(serve: Serve, connect: Connect, origin: str) -> None:
    """Row S5: ``*`` never with credentials, which would be every site's login."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS="*"))
    preflight = await client.ask(
        request("/api/stream", f"Origin: {origin}", "Access-Control-Request-Method: GET", method="OPTIONS")
    )
    for response in (await _ask(client, f"Origin: {origin}", "Cookie: a=b"), preflight):
        assert response.status in (200, 204)
        assert response.headers["Access-Control-Allow-Origin"] in ("*", origin)
        assert "Access-Control-Allow-Credentials" not in response.headers
        assert "origin" in _vary(response)


async def test_a_star_lets_those_ask_who_name_no_origin(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS="*"))
    assert (await _ask(client, "Sec-Fetch-Site: cross-site")).status == 200


# ---- Preflights


@pytest.mark.parametrize("headers", [None, "last-event-id", "content-type,last-event-id,authorization,x-request-id"])
async def test_a_preflight_of_a_listed_page_is_granted(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, headers: str | None
) -> None:
    """Answered before anything is spent."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED, SLUICE_RATE_LIMIT="1/3600"))
    wanted = [f"Access-Control-Request-Headers: {headers}"] if headers else []
    response = await client.ask(
        request("/api/stream", f"Origin: {LISTED}", "Access-Control-Request-Method: GET", *wanted, method="OPTIONS")
    )
    assert response.status in (200, 204)
    assert response.headers["Access-Control-Allow-Origin"] == LISTED
    assert "GET" in response.headers["Access-Control-Allow-Methods"]
    if headers:
        granted = response.headers["Access-Control-Allow-Headers"].lower().replace(" ", "").split(",")
        assert set(headers.split(",")) <= set(granted)
    assert "origin" in _vary(response)
    assert upstream.calls == []
    assert (await _ask(client)).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://sluice.test:81"])
async def test_a_preflight_of_another_page_is_refused(serve: Serve, connect: Connect, origin: str) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await client.ask(
        request("/api/stream", f"Origin: {origin}", "Access-Control-Request-Method: GET", method="OPTIONS")
    )
    assert response.status == 403
    assert _cors_headers(response) == set()
    assert "origin" in _vary(response)


@pytest.mark.parametrize(
    "wanted",
    [
        ["Access-Control-Request-Method: DELETE"],
        ["Access-Control-Request-Method: GET", "Access-Control-Request-Headers: x-evil"],
        ["Access-Control-Request-Method: get"],
        ["Access-Control-Request-Method: \x01"],
    ],
)
async def test_a_preflight_for_more_than_there_is_is_not_granted(
    serve: Serve, connect: Connect, wanted: list[str]
) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await client.ask(request("/api/stream", f"Origin: {LISTED}", *wanted, method="OPTIONS"))
    assert response.status in (200, 204, 400, 403)
    assert "DELETE" not in response.headers.get("Access-Control-Allow-Methods", "")
    assert "x-evil" not in response.headers.get("Access-Control-Allow-Headers", "").lower()


async def test_the_page_itself_is_for_everyone(serve: Serve, connect: Connect) -> None:
    """A link from elsewhere opens it; only the API asks for the origin."""
    client = await connect(await serve())
    response = await client.ask(request("/", "Sec-Fetch-Site: cross-site", "Origin: https://elsewhere.example"))
    assert response.status == 200
    assert _cors_headers(response) == set()


@pytest.mark.parametrize("path", ["/api/nothing", "/v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "DELETE"])
async def test_a_listed_page_may_read_that_there_is_nothing(serve: Serve, path: str, method: str) -> None:
    """Section 3: CORS headers stand on every answer under /api and /v1, refusals too."""
    server = await serve(SLUICE_CORS_ORIGINS="https://page.example")
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, server.url + path, headers={"Origin": "https://page.example"}) as response,
    ):
        assert response.status == 404
        assert "not_found" in str((await response.json())["error"])
        assert response.headers["Access-Control-Allow-Origin"] == "https://page.example"


async def test_options_that_is_no_preflight_is_told_what_there_is(serve: Serve) -> None:
    server = await serve()
    async with aiohttp.ClientSession() as session, session.options(server.url + "/api/stream") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET")
