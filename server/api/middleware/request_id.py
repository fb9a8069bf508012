"""A name for each request, so that a line in one log finds its line in another."""

from __future__ import annotations

import random
import re
from typing import Final

from aiohttp import web

__all__ = ["request_id_of"]

# What may go into a log and a header as it is.
_ACCEPTED: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def request_id_of(request: web.Request) -> str:
    """The ``X-Request-ID`` that came, if it is harmless, else a new one."""
    given = request.headers.get("X-Request-ID")
    return given if given and _ACCEPTED.fullmatch(given) else _random_id()


def _random_id() -> str:
    """No secret: it only has to be another one each time, and asking the kernel would cost more than all else here."""
    return f"{random.getrandbits(64):016x}"
