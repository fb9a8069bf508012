"""The one place that knows every part: settings in, applications out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp_cors
from aiohttp import web
from aiohttp.typedefs import Handler

from server.api import direct_write
from server.api.admin import add_admin_routes
from server.api.aisdk import chat, resume_chat, stop_chat
from server.api.browser import ask, create_stream, stop_stream, view_stream
from server.api.heads import stamp
from server.api.keys import CHATS, CONNECTIONS, DESK, FAST_PATH, LIMITS, SETTINGS, Chats
from server.api.middleware.around import attending
from server.api.middleware.client_address import find_client
from server.api.middleware.head import bound_head
from server.api.middleware.origin import (
    API_PREFIXES,
    EXPOSED_HEADERS,
    allowed_methods,
    check_origin,
    complete_cors,
)
from server.api.middleware.rate_limit import limit_rate, limits_of
from server.api.openai import complete, list_models, show_model
from server.api.page import PublicFiles
from server.connections import Connections
from server.errors import MethodNotAllowed, NotFound
from server.relay.desk import Desk
from server.settings import Settings
from server.upstream import direct
from server.upstream.client import UpstreamClient
from server.upstream.endpoint import Endpoint
from server.upstream.route import UpstreamRoute

__all__ = ["create_admin_app", "create_app", "fast_path_works"]

_PUBLIC: Final = Path(__file__).resolve().parent.parent / "public"
_MAX_BODY: Final = 1 << 20  # bytes of a request's body
_REQUEST_HEADERS: Final = ("Content-Type", "Last-Event-ID", "Authorization", "X-Request-ID")  # of pages elsewhere
_PREFLIGHT_MAX_AGE: Final = 600  # s


async def fast_path_works() -> bool:
    """Whether aiohttp, as it is installed, lets bytes take the short way on both sides."""
    return await direct.works() and await direct_write.works()


def create_app(
    settings: Settings, connections: Connections, *, fast_path: bool = False, demo: bool = False
) -> web.Application:
    """The public application. ``demo`` says that the endpoint is the embedded demo model, for the page to tell;
    ``fast_path`` that bytes take the short way, which has been seen to work."""
    app = web.Application(
        # Outermost first. The log sees every outcome, errors become answers inside it, and nothing is spent before the
        # origin is known to be welcome.
        middlewares=[attending(find_client, bound_head, check_origin), limit_rate],
        client_max_size=_MAX_BODY,
    )
    app[SETTINGS] = settings
    app[CONNECTIONS] = connections
    app[FAST_PATH] = fast_path
    app[LIMITS] = limits_of(settings)
    app[CHATS] = Chats()
    app.cleanup_ctx.append(_open_relay)
    app.on_response_prepare.append(stamp)
    _add_api(app, settings)
    app.on_response_prepare.append(complete_cors)
    PublicFiles(_PUBLIC, settings, demo=demo).add_routes(app)
    return app


def create_admin_app(desk: Desk) -> web.Application:
    """The admin application: never for the public, so it needs none of the public one's guards."""
    app = web.Application()
    add_admin_routes(app, desk)
    return app


async def _open_relay(app: web.Application) -> AsyncIterator[None]:
    """The upstream client and, inside it, the desk: answers are stopped before the session that they use closes."""
    settings = app[SETTINGS]
    async with UpstreamClient(connect_timeout=settings.connect_timeout, direct=app[FAST_PATH]) as client:
        route = UpstreamRoute(
            client,
            _endpoints(settings),
            first_token_timeout=settings.first_token_timeout,
            idle_timeout=settings.idle_timeout,
            retries=settings.retries,
            hedge_after=settings.hedge_after,
            rescue=settings.rescue == "continue",
        )
        app[DESK] = Desk(route, settings)
        yield
        await app[DESK].close()


def _endpoints(settings: Settings) -> list[Endpoint]:
    """In the order in which they are asked."""
    return [
        Endpoint(settings.llm_base_url, settings.llm_model, settings.llm_api_key),
        *(
            Endpoint(fallback.base_url, fallback.model or settings.llm_model, fallback.api_key, f"fallback_{number}")
            for number, fallback in enumerate(settings.fallbacks, 1)
        ),
    ]


def _add_api(app: web.Application, settings: Settings) -> None:
    """The API's resources, each with preflights and with CORS headers on its refusals too."""
    cors = aiohttp_cors.setup(app)

    def add(path: str, **handlers: Handler) -> None:
        resource = app.router.add_resource(path)
        # By add_route, not add_get: that would answer HEAD too, and run the handler for it.
        for method, handler in handlers.items():
            resource.add_route(method, handler)
        cors.add(resource, _cors_of(settings, path, tuple(handlers)))
        resource.add_route("*", _refuse_method if handlers else _refuse_path)

    add("/api/stream", GET=ask)
    add("/api/streams", POST=create_stream)
    add("/api/streams/{id}", GET=view_stream, DELETE=stop_stream)
    add("/api/chat", POST=chat)
    add("/api/chat/{id}/stream", GET=resume_chat)
    add("/api/chat/{id}/stop", POST=stop_chat)
    add("/v1/chat/completions", POST=complete)
    add("/v1/models", GET=list_models)
    add("/v1/models/{model:.+}", GET=show_model)
    for prefix in API_PREFIXES:
        add(prefix + "{path:.*}")  # so that a page of a listed origin can read even that there is nothing here


def _cors_of(settings: Settings, path: str, methods: tuple[str, ...]) -> dict[str, aiohttp_cors.ResourceOptions]:
    """What pages of each listed origin may do with a resource."""
    options = aiohttp_cors.ResourceOptions(  # type: ignore[no-untyped-call]
        allow_credentials="*" not in settings.cors_origins,  # never both: that would be every site's login
        expose_headers=EXPOSED_HEADERS,
        # OpenAI's SDK adds a dozen of its own, others with each version.
        allow_headers="*" if path.startswith("/v1/") else _REQUEST_HEADERS,
        allow_methods=methods,
        max_age=_PREFLIGHT_MAX_AGE,
    )
    return dict.fromkeys(settings.cors_origins, options)


async def _refuse_method(request: web.Request) -> web.StreamResponse:
    raise MethodNotAllowed(request.method, allowed_methods(request))


async def _refuse_path(request: web.Request) -> web.StreamResponse:
    raise NotFound
