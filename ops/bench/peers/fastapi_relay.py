"""The relay that FastAPI's, sse-starlette's and openai's own pages lead to. It runs in a venv of its own, with none of
Sluice's packages, and knows nothing of this project: ``LLM_BASE_URL=http://127.0.0.1:P/v1 python fastapi_relay.py``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator

import uvicorn  # type: ignore[import-not-found,unused-ignore]
from fastapi import FastAPI, Request  # type: ignore[import-not-found,unused-ignore]
from openai import AsyncOpenAI  # type: ignore[import-not-found,unused-ignore]
from sse_starlette import EventSourceResponse  # type: ignore[import-not-found,unused-ignore]

app = FastAPI()
client = AsyncOpenAI(base_url=os.environ["LLM_BASE_URL"], api_key="none")


async def tokens(request: Request, question: str) -> AsyncIterator[dict[str, str]]:
    stream = await client.chat.completions.create(
        model="bench", messages=[{"role": "user", "content": question}], stream=True
    )
    async for chunk in stream:
        if await request.is_disconnected():  # sse-starlette's README: "always check in loops"
            break
        if chunk.choices and (token := chunk.choices[0].delta.content):
            yield {"data": json.dumps({"token": token})}
    yield {"data": "[DONE]"}


@app.get("/api/stream")  # type: ignore[untyped-decorator,unused-ignore]
async def stream(request: Request, q: str) -> EventSourceResponse:
    return EventSourceResponse(tokens(request, q))


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    port = listener.getsockname()[1]
    print(json.dumps({"event": "listening", "url": f"http://127.0.0.1:{port}"}), file=sys.stderr, flush=True)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", backlog=4096)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
