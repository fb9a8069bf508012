"""One request as the tester saw it: its times and its outcome."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Outcome", "Record"]


class Outcome(StrEnum):
    """How a request ended. They are told apart everywhere, since each has another cause and another remedy."""

    COMPLETED = "completed"  # [DONE], with at least one token before it
    INCOMPLETE = "incomplete"  # tokens or not, the body ended or broke without the answer's end
    ERROR = "error"  # told in the stream, no connection, no event stream, or no end within the timeout
    REFUSED = "refused"  # another status than 200
    CANCELLED = "cancelled"  # left on purpose (--abort-rate)
    CUT_OFF = "cut_off"  # still running when the tester stopped
    UNSENT = "unsent"  # due, but waiting for a free place (--max-streams) when the tester stopped

    @property
    def failed(self) -> bool:
        """Whether the endpoint owes it; what the tester itself ended is no failure."""
        return self in (Outcome.INCOMPLETE, Outcome.ERROR, Outcome.REFUSED)


@dataclass(slots=True, kw_only=True)
class Record:
    """The times are CLOCK_MONOTONIC nanoseconds; 0 = it never came to that.

    ``intended_ns`` is when the request was due: by the schedule in the open loop, in the closed loop when the one
    before it (and the pause behind that) was over. ``started_ns`` is when the tester began it; connecting follows.
    """

    number: int
    intended_ns: int
    prompt: int = 0  # its place in the prompt file
    started_ns: int = 0
    queued: bool = False  # it had to wait for a free place (--max-streams)
    reused: bool = False  # over a connection that an earlier request had opened
    connected_ns: int = 0
    first_byte_ns: int = 0  # of the response's head
    token_ns: array[int] = field(default_factory=lambda: array("q"))  # one a token; those of one network read share it
    done_ns: int = 0  # [DONE]
    ended_ns: int = 0
    outcome: Outcome = Outcome.CUT_OFF
    code: str = ""  # why, where the outcome alone does not say
    status: int = 0
    retry_after_s: float | None = None
    bytes: int = 0  # of the body, HTTP's framing taken off
    reasoning_tokens: int = 0
    malformed: int = 0  # events that were no JSON of the format
    prompt_tokens: int | None = None  # as the endpoint reports them
    completion_tokens: int | None = None
    reconnects: int = 0
    resumed_at: list[int] = field(default_factory=list)  # tokens before each resumption: that gap is the tester's doing
    resume_ns: list[int] = field(default_factory=list)  # from asking for the rest to its first event
    lost: int = 0  # events (of ids) or tokens (of the endpoint's own count) that never came
    doubled: int = 0

    @property
    def tokens(self) -> int:
        return len(self.token_ns)

    def end(self, outcome: Outcome, now_ns: int, code: str = "") -> None:
        self.outcome, self.ended_ns, self.code = outcome, now_ns, code
