"""What the application and a request carry, by typed key."""

from __future__ import annotations

from typing import Final
from weakref import WeakValueDictionary

from aiohttp import web

from server.connections import Connections
from server.relay.admission import Allowance, TokenBuckets
from server.relay.desk import Desk, Stream
from server.settings import Settings

__all__ = [
    "ALLOWANCE",
    "BUCKETS",
    "CHATS",
    "CLIENT",
    "CONNECTIONS",
    "DESK",
    "FAST_PATH",
    "LLM_TOKENS",
    "REQUEST_ID",
    "SENT_STATUS",
    "SETTINGS",
    "UPSTREAM_REQUEST_ID",
    "Chats",
]

SETTINGS: Final = web.AppKey("settings", Settings)
CONNECTIONS: Final = web.AppKey("connections", Connections)
# The last answer of each chat, by client and the chat's id, for as long as it is kept anyway.
Chats = WeakValueDictionary[tuple[str, str], Stream]
CHATS: Final = web.AppKey("chats", Chats)
DESK: Final = web.AppKey("desk", Desk)
BUCKETS: Final = web.AppKey("buckets", TokenBuckets)  # of requests; absent where the limit is off
LLM_TOKENS: Final = web.AppKey("llm_tokens", TokenBuckets)  # of generated tokens; likewise

FAST_PATH: Final = web.AppKey("fast_path", bool)  # whether events take the short way to their viewers

REQUEST_ID: Final = web.RequestKey("request_id", str)
CLIENT: Final = web.RequestKey("client", str)  # whom limits count for
ALLOWANCE: Final = web.RequestKey("allowance", Allowance)  # what the client's bucket said
UPSTREAM_REQUEST_ID: Final = web.RequestKey("upstream_request_id", str)  # of an answer in the upstream's language
SENT_STATUS: Final = web.RequestKey("sent_status", int)  # set once the response's head is on its way
