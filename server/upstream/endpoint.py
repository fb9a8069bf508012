"""Where a question can be sent, and how requests have fared there."""

from __future__ import annotations

from dataclasses import dataclass, field

from yarl import URL

from server.upstream.circuit import Circuit

__all__ = ["Endpoint", "Upstream"]


@dataclass(frozen=True, slots=True, eq=False)  # looked up by identity: to hash four strings each time costs more
class Endpoint:
    """One OpenAI-compatible endpoint, and the model that is asked there; ``name`` is what logs and metrics call it."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    name: str = "primary"

    @property
    def url(self) -> URL:
        return URL(self.base_url.rstrip("/") + "/chat/completions")


@dataclass(frozen=True, slots=True)
class Upstream:
    """An endpoint, and the circuit that leaves it out while it keeps failing."""

    endpoint: Endpoint
    circuit: Circuit
