"""The road to an answer: which upstreams are asked, in what order, how often, and how long each may stay silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Protocol

from server.errors import UpstreamTimeout
from server.logs import log_event
from server.upstream.attempt import AttemptFailed
from server.upstream.circuit import Circuit, CircuitState, Permit
from server.upstream.client import UpstreamClient, UpstreamRequest
from server.upstream.endpoint import Endpoint, Upstream
from server.upstream.progress import Progress
from server.upstream.race import Race, all_left_out
from server.upstream.rescue import Continuation, Memory
from server.upstream.retry import RetryBudget, backoff
from server.upstream.silence import SilenceDeadline
from server.wire.chunks import ChunkSink

__all__ = ["RoutedRequest", "UpstreamRoute"]

_NOT_LIKE_THIS: Final = frozenset({400, 422})  # statuses of an endpoint that takes no half answer
_LEAST_TRY: Final = 0.05  # s; what would have less of the first-token time left would be begun in vain

_log = logging.getLogger("sluice.upstream")


class RoutedRequest(UpstreamRequest, Protocol):
    """What is asked, and of whom."""

    def continued(self, said: str, spent: int, /) -> RoutedRequest:
        """The same, with the answer ``said`` so far, at the cost of ``spent`` LLM tokens, to be gone on with."""

    @property
    def model(self) -> str | None:
        """The model that the asker named, one of the configured ones; None leaves it to the server."""


class UpstreamRoute:
    """Asks one endpoint after the other, each again where a further try may help, until one answers.

    ``first_token_timeout`` (s) spans all tries at one endpoint and the pauses between them; ``idle_timeout`` (s) runs
    between deltas with content; ``retries`` is how many further tries follow a failed one, before the first token only.
    ``hedge_after`` (s): after so long without a first token the next endpoint is asked too; None = never.
    ``rescue``: an answer that broke off half-way is finished by another endpoint.
    """

    def __init__(
        self,
        client: UpstreamClient,
        endpoints: Sequence[Endpoint],
        *,
        first_token_timeout: float,
        idle_timeout: float,
        retries: int,
        hedge_after: float | None = None,
        rescue: bool = False,
    ) -> None:
        self._client = client
        self._upstreams = [Upstream(endpoint, Circuit()) for endpoint in endpoints]
        self._first_token_timeout = first_token_timeout
        self._idle_timeout = idle_timeout
        self._retries = retries
        self._hedge_after = hedge_after
        self._rescue = rescue
        self._budget = RetryBudget()

    def model_for(self, request: RoutedRequest) -> str:
        """The model that is asked first."""
        return self._upstreams_for(request)[0].endpoint.model

    @property
    def can_ask(self) -> bool:
        """Whether there is an upstream that is not left out at the moment."""
        return any(upstream.circuit.state is not CircuitState.OPEN for upstream in self._upstreams)

    async def relay(self, request: RoutedRequest, sink: ChunkSink) -> None:
        """Hand the answer's chunks to ``sink`` as they come, and end it once, when it is complete.

        The end comes before the connection is tidied up, so no viewer waits for that. Raises UpstreamFailed where
        there is no complete answer. Cancelling it closes the requests to the endpoints.
        """
        self._budget.deposit()
        upstreams = self._upstreams_for(request)
        try:
            if self._rescue and request.streamed and len(upstreams) > 1:
                await self._answer_whole(upstreams, request, Memory(sink))
            else:
                await self._answer(upstreams, request, sink)
        except AttemptFailed as failed:
            raise failed.error from failed

    async def _answer_whole(self, upstreams: Sequence[Upstream], request: RoutedRequest, memory: Memory) -> None:
        """As :meth:`_answer`, and where that breaks off half-way, the rest of it by those that were not asked yet."""
        try:
            await self._answer(upstreams, request, memory)
        except AttemptFailed as broken:
            left = [upstream for upstream in upstreams if upstream.endpoint.name != memory.answerer.endpoint]
            while left and memory.unfinished and self._budget.take():
                rescuer = left.pop(0)
                try:
                    await self._continue(rescuer, request, memory)
                except AttemptFailed:
                    continue
                return
            raise broken

    async def _continue(self, upstream: Upstream, request: RoutedRequest, memory: Memory) -> None:
        """Let ``upstream`` finish what was begun: behind the words so far, or, where it takes no such request, from the
        start. Raises AttemptFailed."""
        read = memory.text
        for asked, anew in ((request.continued(read, memory.deltas), False), (request, True)):
            permit = upstream.circuit.enter()
            if permit is None:
                raise all_left_out([upstream])
            log_event(_log, logging.INFO, "upstream_rescue", upstream=upstream.endpoint.name, anew=anew)
            try:
                await self._ask(upstream, permit, asked, Progress(Continuation(memory, read, anew=anew)))
            except AttemptFailed as failed:
                said = failed.error.said
                if anew or said is None or said.status not in _NOT_LIKE_THIS:
                    raise
            else:
                return

    def _answer(
        self, upstreams: Sequence[Upstream], request: RoutedRequest, sink: ChunkSink
    ) -> Coroutine[Any, Any, None]:
        """To be awaited: hand on what the first says that says something. Raises AttemptFailed."""
        # A completion that is not streamed shows no first token: it would be paid twice whenever it takes its time.
        if self._hedge_after is None or len(upstreams) == 1 or not request.streamed:
            return self._ask_in_turn(upstreams, request, sink)
        return Race(self._hedge_after, self._budget, sink).run(
            upstreams, lambda upstream, permit, progress: self._ask(upstream, permit, request, progress)
        )

    def _upstreams_for(self, request: RoutedRequest) -> Sequence[Upstream]:
        """Those that have the model which was asked for come first; the others can still stand in for them."""
        if request.model is None or len(self._upstreams) == 1:
            return self._upstreams
        return sorted(self._upstreams, key=lambda upstream: upstream.endpoint.model != request.model)

    async def _ask_in_turn(self, upstreams: Sequence[Upstream], request: RoutedRequest, sink: ChunkSink) -> None:
        last: AttemptFailed | None = None
        for upstream in upstreams:
            permit = upstream.circuit.enter()
            if permit is None:
                continue
            progress = Progress(sink)
            try:
                await self._ask(upstream, permit, request, progress)
            except AttemptFailed as failed:
                if progress.heard or not failed.elsewhere:
                    raise
                last = failed
            else:
                return
        raise last or all_left_out(upstreams)

    async def _ask(self, upstream: Upstream, permit: Permit, request: RoutedRequest, progress: Progress) -> None:
        """Ask one upstream, as often as may help; ``permit`` is for the first try. Raises AttemptFailed."""
        silence = SilenceDeadline(first=self._first_token_timeout, idle=self._idle_timeout)
        try:
            with silence:
                await self._try(upstream, permit, request, progress, silence)
        except TimeoutError as exc:
            if not silence.expired:
                raise
            if progress.finished:  # all was said, but for the [DONE] that never came
                progress.end(())
            elif not progress.ended:
                failed = AttemptFailed(UpstreamTimeout(), "silent")
                self._report(upstream, failed)
                raise failed from exc

    async def _try(
        self, upstream: Upstream, permit: Permit, request: RoutedRequest, progress: Progress, silence: SilenceDeadline
    ) -> None:
        tries = 0
        stale = False
        while True:
            try:
                await self._try_once(upstream, permit, request, progress, silence)
            except AttemptFailed as failed:
                if failed.stale and not stale:
                    # The endpoint closed an idle connection just as it was used again: it has not seen the request,
                    # and nothing is wrong with it. Once, since the next connection may be another stale one.
                    stale = True
                else:
                    tries += 1
                    delay = self._pause_after(failed, tries, progress, silence)
                    if delay is None:
                        self._report(upstream, failed, tries)
                        raise
                    log_event(
                        _log,
                        logging.DEBUG,
                        "upstream_retry",
                        upstream=upstream.endpoint.name,
                        reason=failed.reason,
                        tries=tries,
                        delay_s=round(delay, 3),
                    )
                    await asyncio.sleep(delay)
                next_permit = upstream.circuit.enter()
                if next_permit is None:  # others have found meanwhile that it keeps failing
                    self._report(upstream, failed, tries)
                    raise
                permit = next_permit
            else:
                return

    def _pause_after(
        self, failed: AttemptFailed, tries: int, progress: Progress, silence: SilenceDeadline
    ) -> float | None:
        """Seconds to wait before a further try at the same upstream; None if there is to be none."""
        if not failed.again or progress.heard or tries > self._retries:
            return None
        delay = max(backoff(tries), failed.retry_after or 0.0)
        if silence.left <= delay + _LEAST_TRY or not self._budget.take():
            return None
        return delay

    async def _try_once(
        self, upstream: Upstream, permit: Permit, request: RoutedRequest, progress: Progress, silence: SilenceDeadline
    ) -> None:
        """One request, and what it says of the upstream's health. Raises AttemptFailed."""
        progress.begin_try(permit, silence)
        try:
            await self._client.ask(upstream.endpoint, request, progress)
        except AttemptFailed as failed:
            if failed.counts:
                self._note_failure(upstream, permit)
            raise
        except asyncio.CancelledError:
            # One that is not streamed is as silent while it is made as where nobody makes it: no reason to leave the
            # upstream out for all.
            if silence.left <= 0 and request.streamed:
                self._note_failure(upstream, permit)
            raise
        finally:
            permit.withdrawn()  # where nothing else was said of it

    @staticmethod
    def _note_failure(upstream: Upstream, permit: Permit) -> None:
        if permit.failed():
            log_event(_log, logging.WARNING, "circuit_open", upstream=upstream.endpoint.name)

    @staticmethod
    def _report(upstream: Upstream, failed: AttemptFailed, tries: int | None = None) -> None:
        log_event(
            _log,
            logging.WARNING,
            "upstream_failed",
            upstream=upstream.endpoint.name,
            code=failed.error.code,
            reason=failed.reason,
            tries=tries,
        )
