"""Durations and shares as people write them. No I/O."""

from __future__ import annotations

import re

__all__ = ["BadQuantity", "read_duration_s", "read_share"]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h|)", re.ASCII)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)(%?)", re.ASCII)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


class BadQuantity(ValueError):
    """The text is no such quantity; it says what would be one."""


def read_duration_s(text: str) -> float:
    """``500ms``, ``2s``, ``1.5m``, ``1h``, ``100us``; a bare number is seconds. Raises BadQuantity."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise BadQuantity(f"{text!r} is no duration; one is a number with us, ms, s, m or h, such as 500ms")
    return float(match[1]) * _SECONDS[match[2]]


def read_share(text: str) -> float:
    """``5%`` or ``0.05``, from 0 to 1. Raises BadQuantity."""
    match = _SHARE.fullmatch(text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if share > 1:
        raise BadQuantity(f"{text!r} is no share; one is from 0 to 1, or from 0% to 100%")
    return share
