"""Answers and their viewers: an answer is a log that viewers read. asyncio, no aiohttp."""
