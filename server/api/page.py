"""The page: every file of public/, read once at start and served from memory.

Few and small, they are cheaper to keep than to open; and a file opened per request would wait in the same thread pool
as DNS look-ups, so that a hanging resolver took the page down too. What is not one of them does not exist: no path of a
request ever reaches the file system.
"""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from server.settings import Settings

__all__ = ["CONTENT_SECURITY_POLICY", "PublicFiles"]

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # Text becomes markup in one place, behind the sanitiser's own policy (public/sanitise.js).
    "require-trusted-types-for 'script'; trusted-types dompurify"
)

# By name and not by the machine's own table, which may lack one or call JavaScript otherwise.
_TYPES: Final = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}

_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked about each time: an update is seen at once
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str
    etag: str


class PublicFiles:
    """The files below ``root``, ``index.html`` with its placeholders filled in from the settings."""

    def __init__(self, root: Path, settings: Settings, *, demo: bool) -> None:
        values = {
            "model": settings.llm_model,
            "demo": "true" if demo else "false",
            "heartbeat": f"{settings.heartbeat:g}",
            "max_message": str(settings.max_message_chars),
        }
        self._files: dict[str, _File] = {}
        for path in sorted(root.rglob("*")):
            if not path.is_file():
                continue
            body = path.read_bytes()
            if path.suffix == ".html":
                body = _fill_in(body.decode("utf-8"), values).encode("utf-8")
            name = path.relative_to(root).as_posix()
            self._files["/" if name == "index.html" else f"/{name}"] = _File(
                body, _TYPES.get(path.suffix, "application/octet-stream"), hashlib.sha256(body).hexdigest()[:32]
            )

    def add_routes(self, app: web.Application) -> None:
        for path in self._files:
            app.router.add_get(path, self.serve)

    async def serve(self, request: web.Request) -> web.Response:
        file = self._files[request.path]
        known = request.if_none_match or ()
        response = web.Response(headers=_HEADERS)
        response.etag = file.etag
        if any(etag.value in (file.etag, "*") for etag in known):
            response.set_status(304)
        else:
            response.body = file.body
            response.content_type = file.content_type
            if file.content_type.startswith("text/"):
                response.charset = "utf-8"
        return response


def _fill_in(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", html.escape(value))
    return text
