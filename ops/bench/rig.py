"""One relay and one endpoint, both fresh, and whether what is measured between them can be trusted."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ops.bench.figures import Figures
from ops.bench.procs import Child, Cores, cpu_seconds, idle_seconds, wake_ups
from ops.bench.relays import Relay
from ops.bench.viewers import Ask

__all__ = ["Rig", "open_rig"]

_NOTHING = float("nan")  # a figure of a server where there is none


@dataclass(frozen=True, slots=True)
class Rig:
    """``server`` is None where viewers ask the endpoint itself."""

    relay: Relay
    server: Child | None
    endpoint: Child
    server_core: int

    @property
    def port(self) -> int:
        return (self.server or self.endpoint).port

    @property
    def ask(self) -> Ask:
        return self.relay.ask

    def watch(self) -> Callable[[], Figures]:
        """Start to watch both cores. The result tells, of the time since: the processor time that the server took, and
        in percent of that time how busy it was, how much of its core went to anything else, and how busy simulator and
        viewers were."""
        server = self.server.pid if self.server else 0
        began, rig_used = time.monotonic(), self._own_seconds()
        used = cpu_seconds(server) if server else _NOTHING
        woken = wake_ups(server) if server else 0
        idle = idle_seconds(self.server_core)

        def told() -> Figures:
            cpu_s = cpu_seconds(server) - used if server else _NOTHING
            wall_s = time.monotonic() - began
            others_s = wall_s - (idle_seconds(self.server_core) - idle) - cpu_s
            return {
                "wall_s": wall_s,
                "cpu_s": cpu_s,
                "wake_ups": float(wake_ups(server) - woken) if server else _NOTHING,
                "server_core_percent": 100 * cpu_s / wall_s,
                "others_percent": 100 * others_s / wall_s,
                "rig_core_percent": 100 * (self._own_seconds() - rig_used) / wall_s,
            }

        return told

    def _own_seconds(self) -> float:
        return cpu_seconds(self.endpoint.pid) + time.process_time()  # the viewers are this process


@asynccontextmanager
async def open_rig(relay: Relay, cores: Cores) -> AsyncIterator[Rig]:
    async with (
        Child([sys.executable, "-m", "ops.bench.simulator"], cores.rig) as endpoint,
        relay.open(endpoint.port, cores.server) as server,
    ):
        gc.collect()
        gc.disable()  # a collection among the viewers would look like lateness of the server
        try:
            yield Rig(relay, server, endpoint, cores.server)
        finally:
            gc.enable()
