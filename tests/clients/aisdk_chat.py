"""Chats of the AI SDK's published versions, as the tests let them talk to Sluice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.clients.conftest import RunJs, StartJs
from tests.clients.node import NodeScript

__all__ = ["SDKS", "Message", "Step", "Talk", "open_chat", "outcome", "said_by", "shows", "talk", "user"]

# The first of major 5, which takes no key that it does not know, and the newest of each major.
SDKS = ["ai5", "ai5latest", "ai6", "ai7"]

Step = dict[str, str]
Message = dict[str, Any]


class Talk:
    """What one step came to: the chat's ``status`` and ``error``, its ``messages``, the stream's ``parts``."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.status: str = seen["status"]
        self.error: str | None = seen["error"]
        self.messages: list[Message] = seen["messages"]
        self.parts: list[dict[str, Any]] = seen["parts"]
        self.ends: list[dict[str, bool]] = seen["ends"]

    @property
    def text(self) -> str:
        """The text of the last message."""
        return said_by(self.messages[-1])

    @property
    def part_types(self) -> list[str]:
        """The types of the parts in their order, a run of the same type named once."""
        types = [part["type"] for part in self.parts]
        return [one for one, before in zip(types, [None, *types], strict=False) if one != before]


def said_by(message: Message) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def user(text: str) -> Message:
    """A user's message as a page has kept it."""
    return {"id": "kept-by-the-page", "role": "user", "parts": [{"type": "text", "text": text}]}


def _arguments(url: str, steps: Iterable[Step], chat_id: str, messages: Iterable[Message]) -> dict[str, Any]:
    return {"url": url, "id": chat_id, "messages": list(messages), "steps": list(steps)}


async def talk(
    run_js: RunJs, sdk: str, url: str, *steps: Step, chat_id: str = "chat", messages: Iterable[Message] = ()
) -> list[Talk]:
    """Take all steps and return what each came to."""
    seen = await run_js("aisdk.mjs", sdk=sdk, **_arguments(url, steps, chat_id, messages))
    return [Talk(step) for step in seen["steps"]]


def open_chat(
    start_js: StartJs, sdk: str, url: str, *steps: Step, chat_id: str = "chat", messages: Iterable[Message] = ()
) -> NodeScript:
    """Begin the steps, for a test that does something meanwhile."""
    return start_js("aisdk.mjs", sdk=sdk, **_arguments(url, steps, chat_id, messages))


async def shows(chat: NodeScript, text: str) -> str:
    """Wait until the chat's last message is an answer with that text, and return its id."""
    while (seen := await chat.says()).get("text") != text:
        pass
    return str(seen["id"])


async def outcome(chat: NodeScript) -> list[Talk]:
    """Wait for the end of all steps and return what each came to."""
    return [Talk(step) for step in (await chat.result())["steps"]]
