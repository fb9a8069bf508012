"""The admin listener: is the process alive, and may it be sent new work."""

from __future__ import annotations

from aiohttp import web

from server.relay.desk import Desk

__all__ = ["add_admin_routes"]


def add_admin_routes(app: web.Application, desk: Desk) -> None:
    """``/healthz`` and ``/readyz`` (contract, section 7)."""

    async def healthz(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(request: web.Request) -> web.Response:
        reasons = []
        if desk.draining:
            reasons.append("draining")
        if not desk.can_ask:
            reasons.append("every_upstream_fails")
        status = "unready" if reasons else "ready"
        return web.json_response({"status": status, "reasons": reasons}, status=503 if reasons else 200)

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
