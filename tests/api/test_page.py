"""The files of ``public/`` as they are served: their headers, their copies in caches, and nothing beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.api.page import PublicFiles
from server.settings import read_settings
from tests.api.conftest import Connect
from tests.api.raw_client import Response, request
from tests.conftest import Serve
from tests.sluice_process import ROOT

PUBLIC = ROOT / "public"
FILES = sorted(path.relative_to(PUBLIC).as_posix() for path in PUBLIC.rglob("*") if path.is_file())
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


async def _get(serve: Serve, connect: Connect, target: str, *headers: str, method: str = "GET") -> Response:
    client = await connect(await serve())
    return await client.ask(request(target, *headers, method=method))


@pytest.mark.parametrize("name", FILES)
async def test_each_file_is_served_with_its_type(serve: Serve, connect: Connect, name: str) -> None:
    response = await _get(serve, connect, "/" if name == "index.html" else f"/{name}")
    assert response.status == 200
    assert response.headers["Content-Type"] == TYPES[Path(name).suffix]
    assert response.headers["ETag"]
    if name != "index.html":
        assert response.body == (PUBLIC / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
async def test_each_file_has_the_guarding_headers(serve: Serve, connect: Connect, name: str) -> None:
    """Rows S7, S22: nothing foreign runs in the page, nobody frames it, no type is guessed."""
    response = await _get(serve, connect, "/" if name == "index.html" else f"/{name}")
    policy = dict(
        directive.strip().partition(" ")[::2] for directive in response.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] in ("'none'", "'self'")
    assert policy["frame-ancestors"] == "'none'"
    assert policy["base-uri"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["trusted-types"] == "dompurify"  # the sanitiser's own, and no other
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert "*" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-cache"


async def test_the_page_holds_what_its_policy_allows(serve: Serve, connect: Connect) -> None:
    """No inline script or style, no foreign address: the policy would stop them."""
    page = (await _get(serve, connect, "/")).body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|(?:src|href)=[\"']?(?:https?:)?//", page)


async def test_the_page_tells_the_settings(serve: Serve, connect: Connect) -> None:
    """Its placeholders are filled in, and what is filled in is text, not markup."""
    client = await connect(await serve(LLM_MODEL='a"><script>&', SLUICE_HEARTBEAT="2.5", SLUICE_MAX_QUERY_CHARS="77"))
    page = (await client.ask(request("/"))).body.decode()
    assert "{{" not in page
    assert "<script>&" not in page
    assert "a&quot;&gt;&lt;script&gt;&amp;" in page
    assert 'data-heartbeat="2.5"' in page
    assert 'data-max-message="2464"' in page  # 32 times the bound of a question, as the API takes


async def test_the_page_says_all_its_modules_beforehand(serve: Serve, connect: Connect) -> None:
    """They load at once, and not one after the other as each import is met."""
    page = (await _get(serve, connect, "/")).body.decode()
    named = re.findall(r'<(?:link rel="modulepreload" href|script type="module" src)="/([^"]+)"', page)
    assert sorted(named) == [name for name in FILES if name.endswith(".js")]


async def test_a_copy_is_asked_about_and_not_sent_again(serve: Serve, connect: Connect) -> None:
    """``no-cache`` with an ETag: an update is seen at once, and what has not changed costs a 304."""
    client = await connect(await serve())
    for target in ("/", "/app.js"):
        etag = (await client.ask(request(target))).headers["ETag"]
        assert re.fullmatch(r'(W/)?"[^"]+"', etag)
        for known in (etag, f'"other", {etag}', "*"):
            response = await client.ask(request(target, f"If-None-Match: {known}"))
            assert (response.status, response.body, response.headers["ETag"]) == (304, b"", etag)
            assert "Content-Security-Policy" in response.headers
        for unknown in ('"other"', ""):
            response = await client.ask(request(target, f"If-None-Match: {unknown}"))
            assert response.status == 200


async def test_two_settings_make_two_pages_for_a_cache(serve: Serve, connect: Connect) -> None:
    etags = []
    for model in ("a", "b"):
        client = await connect(await serve(LLM_MODEL=model))
        etags.append((await client.ask(request("/"))).headers["ETag"])
    assert etags[0] != etags[1]


async def test_head_is_the_head_of_get(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve())
    got = await client.ask(request("/"))
    asked = await client.ask(request("/", method="HEAD"))
    assert asked.status == 200
    for name in ("Content-Length", "Content-Type", "ETag", "Content-Security-Policy"):
        assert asked.headers[name] == got.headers[name]
    assert (await client.ask(request("/"))).body == got.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_a_file_is_only_read(serve: Serve, connect: Connect, method: str) -> None:
    response = await _get(serve, connect, "/", method=method)
    assert (response.status, response.error) == (405, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD"}


OUTSIDE = [
    "/../run.py",
    "/..%2frun.py",
    "/%2e%2e/run.py",
    "/%2e%2e%2frun.py",
    "/..%5crun.py",
    "/..\\run.py",
    "//etc/passwd",
    "/%2fetc/passwd",
    "/etc/passwd",
    "/app.js%00.html",
    "/%00",
    "/app.js/",
    "/app.js/x",
    "/.",
    "/./",
    "/index.html/..",
    "/.git/config",
    "/server/main.py",
    "/%252e%252e/run.py",
    "/static/../../run.py",
    "/APP.JS",
    "/app.js;x",
    "/healthz",
    "/readyz",
    "/metrics",
]


@pytest.mark.parametrize("target", OUTSIDE)
async def test_what_is_no_file_of_the_page_does_not_exist(serve: Serve, connect: Connect, target: str) -> None:
    """Row S8: no path of a request reaches the file system. Health and metrics are the admin listener's."""
    response = await _get(serve, connect, target)
    assert response.status in (400, 404)
    assert b"root:" not in response.body
    assert b"import" not in response.body


async def test_a_symlink_out_of_the_page_is_read_at_start_or_never(tmp_path: Path) -> None:
    """What is served was read when the server started; a file that appears later does not exist for it."""
    (tmp_path / "index.html").write_text("{{model}}")
    files = PublicFiles(tmp_path, read_settings({}), demo=False)
    (tmp_path / "later.js").write_text("late")
    assert "/later.js" not in files._files
    assert files._files["/"].body == b"gpt-4o-mini"
