"""A small manual that the demo's tests ask about: of the shape of the project's own, and of fixed words."""

from __future__ import annotations

__all__ = ["MANUAL"]

_README = """\
<p align="center"><img src="logo.svg"></p>

# Sluice

[![build](https://example.org/badge.svg)](https://example.org/build) ![stars](stars.svg)

Sluice streams an LLM's answer into a browser, token by token, from any OpenAI-compatible endpoint.

## Quick start

One command is enough:

```sh
# builds .venv, then starts the server
make run
```

Then open http://127.0.0.1:4001. More in [the guide](docs/guide.md) and at [OpenAI](https://openai.com/docs).

## Configuration

Everything is an environment variable.

| name | default | meaning |
| --- | --- | --- |
| `LLM_BASE_URL` | (demo) | the endpoint |
| `LLM_MODEL` | `gpt-4o-mini` | the model asked for |
| `SLUICE_PORT` | `4001` | the public listener |
| `SLUICE_WORKERS` | `1` | processes sharing the port |
| `SLUICE_HEARTBEAT` | `15` | seconds of silence before a heartbeat |
| `SLUICE_CORS_ORIGINS` | empty | exact origins, or a star |
| `SLUICE_RATE_LIMIT` | `10/60` | requests per seconds, a token bucket per client |
| `SLUICE_RESUME_GRACE` | `5` | seconds that an answer goes on without its viewer |

### Rate limits

A client that asks too often gets 429 and `Retry-After`. The bucket refills evenly.

## Resuming

An answer is a log. A browser that lost its connection comes back with `Last-Event-ID` and reads on from there:
nothing lost, nothing twice.

## Deployment

### nginx

Switch buffering off with `proxy_buffering off`, or the tokens arrive in one lump.

### systemd

The unit restarts the server and lets open streams finish. Socket activation keeps the port open meanwhile.

## Metrics

Prometheus reads `/metrics` on the admin port: time to first token, inter-token latency, open streams.

## Several machines

With Redis, a stream that began on one machine can be read on another.
"""

_CHANGELOG = """\
# Changelog

## 0.2.0

### Added

- Sharing across machines, with Redis.

## 0.1.0

### Added

- Streaming.
"""

_CONTRIBUTING = """\
# Contributing to Sluice

## Tests

`make test` runs every test that the machine can run.

## Style

`make lint` runs ruff and mypy.
"""

MANUAL = {"README.md": _README, "CHANGELOG.md": _CHANGELOG, "CONTRIBUTING.md": _CONTRIBUTING}
