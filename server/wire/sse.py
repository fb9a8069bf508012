"""Server-sent events: bytes to events and back (WHATWG HTML §9.2)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MAX_EVENT_BYTES", "PING_COMMENT", "EventStreamParser", "EventTooLarge", "ServerSentEvent", "encode_event"]

MAX_EVENT_BYTES = 1 << 20  # what one event of an upstream may hold before it counts as no event stream at all

# A heartbeat that every client ignores. One line end: to some a blank line behind a comment is an event without data.
PING_COMMENT = b": ping\n"

_BOM = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """One event, or one line, holds more bytes than the parser's bound; ``events`` are those complete before it."""

    def __init__(self, max_event_bytes: int) -> None:
        super().__init__(f"an event of more than {max_event_bytes} bytes")
        self.events: list[ServerSentEvent] = []


class ServerSentEvent(NamedTuple):
    """One dispatched event. All fields are the bytes as they came: UTF-8, unless the sender got that wrong."""

    data: bytes
    type: bytes = b"message"
    last_event_id: bytes = b""
    lines: bytes = b""  # its data lines as they came, joined by LF, where the parser keeps them


_new = tuple.__new__  # of a NamedTuple, at a third of what calling it costs


class EventStreamParser:
    """An incremental event-stream parser: bytes in, events out, the same events however the network cut the bytes.

    It works on bytes, since the field names and line ends that it looks for are ASCII and no byte of a longer UTF-8
    character is: decoding can wait for whoever needs the text. ``retry`` (ms) holds the last legal ``retry`` field.
    ``keep_lines``: events carry their data lines as they came, for those who pass them on.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_data",
        "_held",
        "_keep_lines",
        "_last_event_id",
        "_lines",
        "_max_event_bytes",
        "_partial",
        "_pending_id",
        "_type",
        "retry",
    )

    def __init__(
        self, *, max_event_bytes: int = MAX_EVENT_BYTES, last_event_id: bytes = b"", keep_lines: bool = False
    ) -> None:
        self.retry: int | None = None
        self._keep_lines = keep_lines
        self._max_event_bytes = max_event_bytes
        self._at_start = True  # a byte order mark may still come
        self._after_cr = False  # the last feed ended with CR: an LF that follows belongs to it
        self._partial = bytearray()  # the line whose end has not come yet
        self._data: list[bytes] = []
        self._lines: list[bytes] = []  # the data lines whole, if they are kept
        self._type = b""
        self._last_event_id = last_event_id  # of the last complete block
        self._pending_id = last_event_id  # takes effect with the block's blank line
        self._held = 0  # bytes kept for the event under way, without the partial line

    @property
    def last_event_id(self) -> bytes:
        """The id that a reconnect would send: that of the last block whose blank line has come."""
        return self._last_event_id

    @property
    def between_events(self) -> bool:
        """Whether what comes next begins an event: nothing of one is held, not even the first half of a line end."""
        return not (self._held or self._partial or self._at_start or self._after_cr)

    def give_back(self, limit: int) -> bytes:
        """The bytes of a line that has begun, if nothing else of its event is held and they are at most ``limit``: the
        parser forgets them, and :meth:`feed` may be given them again."""
        if self._held or self._at_start or self._after_cr or len(self._partial) > limit:
            return b""
        line = bytes(self._partial)
        self._partial.clear()
        return line

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take the next bytes, cut anywhere (inside a CRLF, inside a character), and return the events they complete.

        Lines end with CR, LF or CRLF and nothing else; an event without its blank line is dropped (§9.2.6).
        Time is linear in the bytes fed; what is kept is bounded by ``max_event_bytes``, comments not counted.
        Raises EventTooLarge past the bound, with the events before it; the parser is of no use afterwards.
        """
        if self._at_start and not self._partial and len(data) >= len(_BOM):
            self._at_start = False
            data = data.removeprefix(_BOM)
        if self.between_events and b"\r" not in data and len(data) <= self._max_event_bytes:
            return self._feed_blocks(data)
        return self._feed_lines(data)

    def _feed_blocks(self, data: bytes) -> list[ServerSentEvent]:
        """As :meth:`feed`, between events, with no CR and within the bound: nearly all streams look like that."""
        if data.endswith(b"\n\n") and data.startswith(b"data: "):
            values = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(values):  # one line each
                id_, kept = self._last_event_id, self._keep_lines
                return [
                    _new(ServerSentEvent, (value, b"message", id_, b"data: " + value if kept else b""))
                    for value in values
                ]
        *blocks, rest = data.split(b"\n\n")
        events: list[ServerSentEvent] = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                lines = block if self._keep_lines else b""
                events.append(ServerSentEvent(block[6:], b"message", self._last_event_id, lines))
            else:
                events += self._feed_lines(block + b"\n\n")
        if rest:
            events += self._feed_lines(rest)
        return events

    def _feed_lines(self, data: bytes) -> list[ServerSentEvent]:
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == 0x0A:
                data = data[1:]
        if self._at_start:
            # The mark may be cut: hold its beginning back until it is clear what the first three bytes are.
            self._partial += data
            if len(self._partial) < len(_BOM) and _BOM.startswith(self._partial):
                return []
            data = bytes(self._partial).removeprefix(_BOM)
            self._partial.clear()
            self._at_start = False

        # bytes.splitlines knows exactly the standard's three line ends (str.splitlines knows eight more).
        lines = data.splitlines(keepends=True)
        rest = b""
        if lines and lines[-1][-1] not in b"\r\n":
            rest = lines.pop()
        events: list[ServerSentEvent] = []
        try:
            for line in lines:
                if self._partial:
                    self._partial += line
                    line = bytes(self._partial)
                    self._partial.clear()
                content = line.rstrip(b"\r\n")  # one line end: splitlines leaves no other in a line
                if content:
                    self._take_field(content)
                elif event := self._end_block():
                    events.append(event)
            self._partial += rest
            self._check_bound(len(self._partial))
        except EventTooLarge as exc:
            exc.events = events
            raise
        if lines:
            self._after_cr = not rest and lines[-1][-1] == 0x0D
        return events

    def _take_field(self, line: bytes) -> None:
        """Process one line that is not blank (§9.2.6, "interpreting an event stream")."""
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            if self._keep_lines:
                self._lines.append(line)
            self._hold(len(line) + 1)
        elif name == b"event":
            self._type = value
            self._hold(len(line))
        elif name == b"id":
            if b"\0" not in value:
                self._pending_id = value
                self._hold(len(line))
        elif name == b"retry" and value.isdigit() and len(value) < 16:  # bytes.isdigit is ASCII only
            self.retry = int(value)

    def _hold(self, size: int) -> None:
        self._held += size
        self._check_bound(0)

    def _check_bound(self, partial: int) -> None:
        if self._held + partial > self._max_event_bytes:
            raise EventTooLarge(self._max_event_bytes)

    def _end_block(self) -> ServerSentEvent | None:
        """A blank line: the id takes effect, and a block that had a ``data`` field is an event."""
        self._last_event_id = self._pending_id
        event = None
        if self._data:
            lines = b"\n".join(self._lines)
            event = ServerSentEvent(b"\n".join(self._data), self._type or b"message", self._last_event_id, lines)
            self._data.clear()
            self._lines.clear()
        self._type = b""
        self._held = 0
        return event


def encode_event(data: bytes, *, type: bytes = b"", id: bytes = b"", retry: int | None = None) -> bytes:  # noqa: A002
    """One event block, ending with its blank line. The fields' order is retry, event, id, data.

    ``data`` may hold no CR (it would end a line early); each LF in it starts a further ``data`` line.
    """
    return b"%b%b%bdata: %b\n\n" % (
        b"" if retry is None else b"retry: %d\n" % retry,
        b"event: %b\n" % type if type else b"",
        b"id: %b\n" % id if id else b"",
        data.replace(b"\n", b"\ndata: "),
    )
