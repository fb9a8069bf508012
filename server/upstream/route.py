"""The road to an answer: which endpoint is asked, how often, and how long it may stay silent."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final

from server.errors import UpstreamTimeout
from server.logs import log_event
from server.upstream.attempt import AttemptFailed
from server.upstream.client import Endpoint, UpstreamClient
from server.upstream.silence import SilenceDeadline
from server.wire.chat import ChatRequest, encode_chat_request
from server.wire.chunks import Chunk, ChunkSink

__all__ = ["UpstreamRoute", "backoff"]

_FIRST_DELAY: Final = 0.25  # s; doubled for each further try
_LONGEST_DELAY: Final = 8.0  # s
_LEAST_TRY: Final = 0.05  # s; what would have less of the first-token time left would be begun in vain

_log = logging.getLogger("sluice.upstream")


def backoff(tries: int, *, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait before the next try: exponential, with jitter so that the refused do not come back together.

    ``tries`` counts those that failed, from 1; ``jitter`` gives a value in [0, 1).
    """
    return float(min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (tries - 1)) * (0.5 + jitter() / 2))


class UpstreamRoute:
    """Asks the endpoint, again where a further try may help, until it answers or is given up.

    ``first_token_timeout`` (s) spans all tries and the pauses between them; ``idle_timeout`` (s) runs between deltas
    with content; ``retries`` is how many further tries follow a failed one, before the first token only.
    """

    def __init__(
        self,
        client: UpstreamClient,
        endpoint: Endpoint,
        *,
        first_token_timeout: float,
        idle_timeout: float,
        retries: int,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._first_token_timeout = first_token_timeout
        self._idle_timeout = idle_timeout
        self._retries = retries

    @property
    def model(self) -> str:
        """The model that is asked first."""
        return self._endpoint.model

    async def relay(self, request: ChatRequest, sink: ChunkSink) -> None:
        """Hand the answer's chunks to ``sink`` as they come, and end it once, when it is complete.

        The end comes before the connection is tidied up, so no viewer waits for that. Raises UpstreamFailed where
        there is no complete answer. Cancelling it closes the request to the endpoint.
        """
        silence = SilenceDeadline(first=self._first_token_timeout, idle=self._idle_timeout)
        progress = _Progress(sink, silence)
        try:
            async with silence:
                await self._ask(request, progress, silence)
        except TimeoutError as exc:
            if not silence.expired:
                raise
            if progress.finished:  # all was said, but for the [DONE] that never came
                progress.end(())
            elif not progress.ended:
                raise UpstreamTimeout from exc

    async def _ask(self, request: ChatRequest, progress: _Progress, silence: SilenceDeadline) -> None:
        loop = asyncio.get_running_loop()
        tries = 0
        stale = False
        while True:
            progress.begin_try()
            try:
                await self._client.ask(self._endpoint, encode_chat_request(request, self._endpoint.model), progress)
            except AttemptFailed as failed:
                if failed.stale and not stale:
                    # The endpoint closed an idle connection just as it was used again: it has not seen the request,
                    # and nothing is wrong with it. Once, since the next connection may be another stale one.
                    stale = True
                    continue
                tries += 1
                if progress.heard or not failed.again or tries > self._retries:
                    self._report(failed, tries)
                    raise failed.error from failed
                delay = backoff(tries)
                if failed.retry_after is not None:
                    delay = max(delay, failed.retry_after)
                if loop.time() + delay + _LEAST_TRY >= silence.deadline:
                    self._report(failed, tries)
                    raise failed.error from failed
                log_event(
                    _log, logging.DEBUG, "upstream_retry", reason=failed.reason, tries=tries, delay_s=round(delay, 3)
                )
                await asyncio.sleep(delay)
            else:
                return

    @staticmethod
    def _report(failed: AttemptFailed, tries: int) -> None:
        log_event(_log, logging.WARNING, "upstream_failed", code=failed.error.code, reason=failed.reason, tries=tries)


class _Progress:
    """What has been heard of the answer so far.

    What a try says before its first content (a usage, a finish_reason, a model's name) is held back until that comes,
    or the end: a try that comes to nothing must leave no trace in the answer of the next one.
    """

    __slots__ = ("_held", "_silence", "_sink", "ended", "finished", "heard")

    def __init__(self, sink: ChunkSink, silence: SilenceDeadline) -> None:
        self._sink = sink
        self._silence = silence
        self._held = Chunk()
        self.heard = False  # a delta with content has been handed on
        self.finished = False  # a finish_reason has come
        self.ended = False

    def begin_try(self) -> None:
        """Forget what the last try said; nothing of it has been handed on."""
        self._held = Chunk()
        self.finished = False

    def take(self, chunks: Sequence[Chunk]) -> None:
        if chunks := self._listen(chunks):
            self._sink.take(chunks)

    def take_texts(self, texts: Sequence[bytes]) -> None:
        """The hot path. The first content of a try never comes this way: from it the short cut is learnt."""
        self._silence.heard()
        self._sink.take_texts(texts)

    def end(self, chunks: Sequence[Chunk]) -> None:
        if not self.ended:
            self.ended = True
            chunks = self._listen(chunks)
            self._sink.end(chunks if self.heard else [self._held])

    def _listen(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Note what ``chunks`` say, and return what is to be handed on now."""
        heard = False
        for chunk in chunks:
            if chunk.deltas:
                heard = True
            if chunk.finish_reason:
                self.finished = True
        if not (heard or self.heard):
            self._hold(chunks)
            return ()
        if not self.heard:
            self.heard = True
            chunks = [self._held, *chunks]
        if heard:
            self._silence.heard()
        return chunks

    def _hold(self, chunks: Sequence[Chunk]) -> None:
        """Keep the last word on each thing, in one chunk: an endpoint may repeat itself for as long as it is let."""
        for chunk in chunks:
            held = self._held
            self._held = Chunk(
                finish_reason=chunk.finish_reason or held.finish_reason,
                usage=chunk.usage or held.usage,
                model=chunk.model or held.model,
            )
