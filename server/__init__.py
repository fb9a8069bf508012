"""Sluice: streams an LLM's answer into a browser. The floors, top to bottom: main, app, api, relay, upstream, wire."""
