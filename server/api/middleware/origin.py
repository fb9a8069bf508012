"""Which pages may ask. aiohttp-cors writes the headers; what it leaves open is decided here, before anything is spent.

aiohttp-cors runs the handler for an origin that is not allowed and only withholds the headers: the page could not read
the answer, but it would have been paid for.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web
from yarl import URL

from server.api.keys import SETTINGS
from server.api.middleware.client_address import from_trusted_proxy
from server.errors import MethodNotAllowed, NotFound, OriginNotAllowed

__all__ = ["API_PREFIXES", "EXPOSED_HEADERS", "allowed_methods", "check_origin", "complete_cors", "is_api"]

API_PREFIXES: Final = ("/api/", "/v1/")
EXPOSED_HEADERS: Final = ("RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID", "Location")


def is_api(request: web.Request) -> bool:
    return request.path.startswith(API_PREFIXES)


def check_origin(request: web.Request) -> None:
    """Refuse a page of an origin that is neither ours nor listed (contract, section 3: 403)."""
    if is_api(request):
        if not _may_ask(request):
            raise OriginNotAllowed
        if request.method == "OPTIONS" and not _is_preflight(request):
            # aiohttp-cors has put OPTIONS on the resource, for preflights, and answers all else with a 403 of its own.
            if allowed := allowed_methods(request) - {"OPTIONS"}:
                raise MethodNotAllowed("OPTIONS", allowed)
            raise NotFound


async def complete_cors(request: web.Request, response: web.StreamResponse) -> None:
    """Put the headers for a listed origin where aiohttp-cors does not: on what OPTIONS is refused with. For
    ``on_response_prepare``, behind aiohttp-cors, which takes it amiss to find them there."""
    listed = request.app[SETTINGS].cors_origins
    origin = request.headers.get("Origin", "")
    if not is_api(request) or "Access-Control-Allow-Origin" in response.headers:
        return
    if origin and _is_listed(origin, listed):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = ",".join(EXPOSED_HEADERS)
        if "*" not in listed:
            response.headers["Access-Control-Allow-Credentials"] = "true"


def allowed_methods(request: web.Request) -> frozenset[str]:
    """The methods that the resource under the request's path has."""
    resource = request.match_info.route.resource
    return frozenset(route.method for route in resource or () if route.method != "*")


def _may_ask(request: web.Request) -> bool:
    origin = request.headers.get("Origin")
    # No Origin comes with a no-cors GET either (an <img> whose src is our stream), but then the browser says so.
    if origin is None and request.headers.get("Sec-Fetch-Site") not in {"cross-site", "same-site"}:
        return True
    if _is_listed(origin, request.app[SETTINGS].cors_origins):
        return True
    return origin is not None and origin == _own_origin(request)


def _is_listed(origin: str | None, listed: tuple[str, ...]) -> bool:
    return "*" in listed or origin in listed


def _own_origin(request: web.Request) -> str | None:
    """The origin of the page that we serve, as its browser writes it: without the scheme's default port."""
    scheme = request.scheme
    if from_trusted_proxy(request):
        forwarded = request.headers.get("X-Forwarded-Proto", scheme).rpartition(",")[2].strip().lower()
        scheme = forwarded if forwarded in {"http", "https"} else scheme
    try:
        return str(URL(f"{scheme}://{request.headers.get('Host', '').lower()}").origin())
    except (ValueError, IndexError):  # the latter is yarl's for a host of []
        return None


def _is_preflight(request: web.Request) -> bool:
    return "Origin" in request.headers and "Access-Control-Request-Method" in request.headers
