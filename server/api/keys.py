"""What the application and a request carry, by typed key."""

from __future__ import annotations

from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from aiohttp import web

from server.connections import Connections
from server.relay.admission import Allowance, TokenBuckets
from server.relay.desk import Desk, Stream
from server.settings import Settings

__all__ = [
    "CHATS",
    "CONNECTIONS",
    "DESK",
    "EXCHANGE",
    "FAST_PATH",
    "LIMITS",
    "SETTINGS",
    "Chats",
    "Exchange",
    "Limits",
]

SETTINGS: Final = web.AppKey("settings", Settings)
CONNECTIONS: Final = web.AppKey("connections", Connections)
# The last answer of each chat, by client and the chat's id, for as long as it is kept anyway.
Chats = WeakValueDictionary[tuple[str, str], Stream]
CHATS: Final = web.AppKey("chats", Chats)
DESK: Final = web.AppKey("desk", Desk)


class Limits(NamedTuple):
    """What each client may spend; None where there is no limit. ``policy`` tells clients of the first one."""

    requests: TokenBuckets | None
    llm_tokens: TokenBuckets | None
    policy: str


LIMITS: Final = web.AppKey("limits", Limits)
FAST_PATH: Final = web.AppKey("fast_path", bool)  # whether events take the short way to their viewers


class Exchange:
    """What is known of a request and its answer, as they go along: one thing to look up, not five."""

    __slots__ = ("allowance", "client", "limits", "request_id", "sent_status", "upstream_request_id")

    def __init__(self, request_id: str, limits: Limits) -> None:
        self.request_id = request_id
        self.limits = limits
        self.client = ""  # whom limits count for
        self.allowance: Allowance | None = None  # what the client's bucket said
        self.upstream_request_id: str | None = None  # of an answer in the upstream's language
        self.sent_status: int | None = None  # set once the response's head is on its way


# Of every request that has come as far as the middlewares; a failed expectation is refused before.
EXCHANGE: Final = web.RequestKey("exchange", Exchange)
