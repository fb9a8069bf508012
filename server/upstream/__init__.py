"""The OpenAI-compatible side: the only user of aiohttp's ClientSession."""
