"""What an endpoint's events look like, remembered from one answer to the next.

Within one answer the template (server/wire/template.py) spares the decoding of all token events but the first; but of a
short answer that one, and the events round the tokens, are what most of the time goes to. An endpoint says them in the
same bytes each time, but for what stands before the choices: who answers, and when.
"""

from __future__ import annotations

import re
from typing import Final

from server.wire.chunks import Chunk
from server.wire.template import TokenTemplate

__all__ = ["KnownShapes"]

# What may stand before the choices and is no part of the answer but for the model: fields of known names, in whose
# values nothing else can hide.
_VALUE: Final = rb'(?:"[^"\\\x00-\x1f]*"|0|[1-9][0-9]{0,18}|null)'
_FIELD: Final = rb'"(?:id|object|created|service_tier|system_fingerprint|provider)": ?' + _VALUE + rb", ?"
_ENVELOPE: Final = re.compile(rb'\{(?:%b)*"model": ?"([ !#-\[\]-~]{1,200})", ?(?:%b)*(?="choices":)' % (_FIELD, _FIELD))
_NAMES_MODEL: Final = re.compile(rb'"model"|\\')  # perhaps; what stands behind the choices would have the last word
_MAX_SILENT: Final = 16  # events without text that are remembered
_MAX_BYTES: Final = 512  # of each, and of the frame, from the choices on: a copy of it is held by each open answer


class KnownShapes:
    """Of one endpoint: what stands round the text of its token events, and what those without text say, each from the
    choices on. Proved by having been decoded, in another answer; no I/O."""

    __slots__ = ("_frame", "_silent")

    def __init__(self) -> None:
        self._frame: tuple[bytes, bytes, bytes] | None = None  # before the text, behind it, and the line end
        self._silent: dict[bytes, Chunk] = {}

    def recognise(self, data: bytes) -> tuple[TokenTemplate, int] | None:
        """For an answer whose first event holds ``data``: the template of its token events, and how many bytes stand
        before the choices, the same in all its events. None where too little is known, as where that event itself has
        still to be decoded: it might be none, or have more to say of the model."""
        if self._frame is None or (envelope := _ENVELOPE.match(data)) is None:
            return None
        before, after, line_end = self._frame
        template = TokenTemplate(envelope[0] + before, after, line_end, envelope[1].decode("ascii"))
        if data[envelope.end() :] not in self._silent and template.text_of(data) is None:
            return None
        return template, envelope.end()

    def meaning_of(self, choices: bytes) -> Chunk | None:
        """What an event says that has no text, by its bytes from the choices on, but for the model; None where that is
        not known."""
        return self._silent.get(choices)

    def remember(self, template: TokenTemplate) -> None:
        """``template`` was learnt in an answer, and token events that came later did fit it."""
        envelope = _ENVELOPE.match(template.before)
        if envelope is None:
            return
        before, after = template.before[envelope.end() :], template.after
        frame = before + after
        if len(frame) <= _MAX_BYTES and not _NAMES_MODEL.search(frame):
            self._frame = (before, after, template.line_end)

    def note(self, data: bytes, chunk: Chunk) -> None:
        """An event's ``data`` was decoded to ``chunk``."""
        if self._frame is None or chunk != Chunk(finish_reason=chunk.finish_reason, model=chunk.model):
            return
        envelope = _ENVELOPE.match(data)
        if envelope is None or len(choices := data[envelope.end() :]) > _MAX_BYTES or _NAMES_MODEL.search(choices):
            return
        if len(self._silent) >= _MAX_SILENT:
            self._silent.clear()
        self._silent[choices] = chunk._replace(model=None)
