"""Bytes to values and back: server-sent events, OpenAI chunks, our own events. No I/O, no asyncio."""
