"""The peer of the benchmark: the relay that a tutorial would write with aiohttp, and nothing more.

One line at a time, ``json`` both ways, one write per token; a viewer who leaves cancels the handler and with it the
upstream request. It speaks the token, usage and ``[DONE]`` events of the browser's stream. It has no ids, no resuming,
no limits and no time-outs, so whatever Sluice costs beyond it must have its reason.

``LLM_BASE_URL=http://127.0.0.1:P/v1 python -m ops.bench.plain_relay`` listens on a free port and says which on stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

BASE_URL = web.AppKey("BASE_URL", str)
SESSION = web.AppKey("SESSION", aiohttp.ClientSession)


async def open_session(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)  # the default makes the 101st stream wait
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as app[SESSION]:
        yield


async def stream(request: web.Request) -> web.StreamResponse:
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": request.query["q"]}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    finish_reason = None
    async with request.app[SESSION].post(f"{request.app[BASE_URL]}/chat/completions", json=body) as upstream:
        async for line in upstream.content:
            text = line.decode().strip()
            if not text.startswith("data: "):
                continue
            if text == "data: [DONE]":
                await response.write(b"data: [DONE]\n\n")
                break
            chunk = json.loads(text[6:])
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                if token := choice["delta"].get("content"):
                    await response.write(f"data: {json.dumps({'token': token})}\n\n".encode())
            if usage := chunk.get("usage"):
                await response.write(_usage_event(finish_reason, usage))
    await response.write_eof()
    return response


def _usage_event(finish_reason: str | None, usage: dict[str, Any]) -> bytes:
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    return f"event: usage\ndata: {json.dumps({'finish_reason': finish_reason, **counts})}\n\n".encode()


async def main() -> None:
    app = web.Application()
    app[BASE_URL] = os.environ["LLM_BASE_URL"]
    app.cleanup_ctx.append(open_session)
    app.router.add_get("/api/stream", stream)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(json.dumps({"event": "listening", "url": "http://{}:{}".format(*runner.addresses[0][:2])}), file=sys.stderr)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
