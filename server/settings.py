"""Settings: one frozen value, read once from command line, environment and a TOML file; every mistake is told.

Each field of :class:`Settings` carries the reader of its value; names, defaults, ranges and help come from there and
nowhere else. The environment name is the field's in capitals, with ``SLUICE_`` in front unless it begins with ``llm_``.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from yarl import URL

__all__ = [
    "CONFIG_VARIABLE",
    "Fallback",
    "Mistakes",
    "Option",
    "Rate",
    "Settings",
    "TrustedProxies",
    "describe",
    "options",
    "read_settings",
]

CONFIG_VARIABLE: Final = "SLUICE_CONFIG"
_PREFIX: Final = "SLUICE_"

T = TypeVar("T")


class Mistakes(Exception):
    """What is wrong with the configuration: one line each, in ``lines``."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


# ---- Readers: a value as TOML or the environment has it -> the setting


@dataclass(frozen=True, slots=True)
class Reader(Generic[T]):
    """Turns what stands in the environment (text) or in the file (a TOML value) into the setting.

    ``read`` raises ValueError for what it does not take, with a reason that begins with "it " or "its " where there is
    more to tell; ``takes`` says what it does. ``toml`` has the types that the file may use; the environment has only
    text.
    """

    takes: str
    read: Callable[[Any], T]
    toml: tuple[type, ...] = (str,)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")  # for readers, a wrong type is a wrong value
    return value


def _integer(low: int, high: int) -> Reader[int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            value = int(value)
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Reader(f"an integer from {low} to {high}", read, toml=(int,))


def _number(low: float, high: float, unit: str = "") -> Reader[float]:
    def read(value: Any) -> float:
        if isinstance(value, str) and re.fullmatch(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)", value):
            value = float(value)
        if isinstance(value, str) or not low <= value <= high:  # not where it is NaN, either
            raise ValueError
        return float(value)

    return Reader(f"{unit or 'a number'} from {low:g} to {high:g}", read, toml=(int, float))


def _seconds(low: float, high: float) -> Reader[float]:
    return _number(low, high, "seconds")


def _choice(*names: str) -> Reader[str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return _text(value)

    return Reader("one of " + ", ".join(names), read)


def _read_flag(value: Any) -> bool:
    if value in ("true", "false"):
        return bool(value == "true")
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_base_url(value: Any) -> str:
    text = _text(value).strip()
    if not text:
        return ""
    url = _parse_url(text)
    if url.scheme not in ("http", "https") or not url.host or not url.port:
        raise ValueError
    if " " in text or not text.isprintable():  # yarl would drop or quote them
        raise ValueError("it holds a space or a control character")
    if url.user is not None or url.password is not None:
        raise ValueError("it holds a user name or password; the key belongs into LLM_API_KEY")
    if "?" in text or "#" in text:
        raise ValueError("it has a query or fragment, which /chat/completions could not follow")
    return text.rstrip("/")


def _parse_url(text: str) -> URL:
    try:
        return URL(text)
    except IndexError as exc:  # what yarl 1.25 makes of http://[]@
        raise ValueError from exc


def _read_key(value: Any) -> str:
    text = _text(value).strip()
    if not all(0x21 <= ord(character) <= 0x7E for character in text):
        raise ValueError("it holds characters that no header can carry")
    return text


def _read_name(value: Any) -> str:
    text = _text(value).strip()
    if not text or len(text) > 200 or not text.isprintable():
        raise ValueError
    return text


def _read_host(value: Any) -> str:
    text = _text(value).strip()
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", text):
        raise ValueError
    return text


def _read_path(value: Any) -> str:
    text = _text(value)
    if "\0" in text or len(os.fsencode(text)) > 107:  # sun_path has 108 bytes, a NUL at the end (unix(7))
        raise ValueError
    return text


def _read_prompt(value: Any) -> str:
    text = _text(value)
    if len(text) > 32_000 or "\0" in text or _has_surrogates(text):
        raise ValueError
    return text


def _has_surrogates(text: str) -> bool:
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


@dataclass(frozen=True, slots=True)
class Rate:
    """``amount`` per ``seconds``: the size of a token bucket, and the time in which an empty one fills."""

    amount: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.amount}/{self.seconds:g}"


def _read_rate(value: Any) -> Rate | None:
    text = _text(value).strip()
    if text == "off":
        return None
    if not (match := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,7}(?:\.[0-9]{1,6})?)", text)):
        raise ValueError
    amount, seconds = int(match[1]), float(match[2])
    if amount < 1 or seconds <= 0:
        raise ValueError
    return Rate(amount, seconds)


def _items(value: Any) -> list[str]:
    """A comma list, or a TOML array of texts."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ValueError
    return [text for part in parts if (text := _text(part).strip())]


def _read_origins(value: Any) -> tuple[str, ...]:
    origins = _items(value)
    for origin in origins:
        if origin == "*" and len(origins) == 1:
            continue
        url = _parse_url(origin)
        if url.scheme not in ("http", "https") or not url.host or str(url.origin()) != origin:
            raise ValueError(f"it has {_printable(repr(origin))}, which is no origin as browsers write it")
    return tuple(origins)


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The peers that may name the client: networks, and whoever is on the Unix socket."""

    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    unix: bool

    def __contains__(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        # Not ``address in network``, which makes objects on the way: it is asked for every request.
        number = int(address)
        return any(
            number & int(network.netmask) == int(network.network_address)
            for network in self.networks
            if network.version == address.version
        )

    def __str__(self) -> str:
        return ",".join([*map(str, self.networks), *(["unix"] if self.unix else [])])


def _read_proxies(value: Any) -> TrustedProxies:
    items = _items(value)
    return TrustedProxies(tuple(ipaddress.ip_network(item) for item in items if item != "unix"), "unix" in items)


@dataclass(frozen=True, slots=True)
class Fallback:
    """A further upstream. ``model`` is empty where it is asked for the same one."""

    base_url: str
    api_key: str = field(default="", repr=False)
    model: str = ""

    def __str__(self) -> str:
        """As JSON, without the key."""
        shown = {"base_url": self.base_url, "api_key": self.api_key and "***", "model": self.model}
        return json.dumps({name: text for name, text in shown.items() if text}, separators=(",", ":"))


def _read_fallbacks(value: Any) -> tuple[Fallback, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except RecursionError:
            raise ValueError from None
    if not isinstance(value, list):
        raise ValueError("it is not a list")
    return tuple(_read_fallback(f"entry {number}", item) for number, item in enumerate(value, 1))


def _read_fallback(where: str, item: Any) -> Fallback:
    if not isinstance(item, dict) or not set(item) <= {"base_url", "api_key", "model"}:
        raise ValueError(f"its {where} is not an object of base_url, api_key and model")
    try:
        base_url = _read_base_url(item.get("base_url", ""))
    except ValueError:
        base_url = ""
    if not base_url:
        raise ValueError(f"its {where} has no base_url that is an http or https URL without key and query")
    try:
        model = _read_name(item["model"]) if "model" in item else ""
        return Fallback(base_url, _read_key(item.get("api_key", "")), model)
    except ValueError:
        raise ValueError(f"its {where} has an api_key or a model that cannot be one") from None


def _read_hedge(value: Any) -> float | None:
    return None if value == "off" else _HEDGE.read(value)


_HEDGE: Final = _seconds(0.01, 3600)


def _read_grace(value: Any) -> float:
    return math.inf if value == "finish" else _GRACE.read(value)


_GRACE: Final = _seconds(0, 86_400)
_RATE: Final = Reader("REQUESTS/SECONDS, such as 10/60, or off", _read_rate)
_PORT: Final = _integer(0, 65535)

# ---- The settings


def _option(reader: Reader[T], default: T, meaning: str, *, secret: bool = False) -> T:
    metadata = {"reader": reader, "meaning": meaning, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the process was told, in the order of the README's table. Times are in seconds."""

    llm_base_url: str = _option(
        Reader("an http or https URL such as https://api.openai.com/v1", _read_base_url),
        "",
        "the OpenAI-compatible endpoint; empty = the embedded demo model",
    )
    llm_api_key: str = _option(
        Reader("a key of printable ASCII", _read_key), "", "sent upstream as Authorization: Bearer", secret=True
    )
    llm_model: str = _option(Reader("a model's name", _read_name), "gpt-4o-mini", "the model asked for")
    fallbacks: tuple[Fallback, ...] = _option(
        Reader(
            'a JSON list such as [{"base_url":"https://…/v1","api_key":"…","model":"…"}]',
            _read_fallbacks,
            toml=(str, list),
        ),
        (),
        'a JSON list of further upstreams, `{"base_url","api_key","model"}`, asked in this order where the first fails',
        secret=True,
    )
    host: str = _option(Reader("an address or host name", _read_host), "127.0.0.1", "the public listener's address")
    port: int = _option(_PORT, 4001, "the public listener's port; 0 = any free one")
    socket: str = _option(
        Reader("a path of at most 107 bytes", _read_path), "", "a Unix socket's path, instead of host and port"
    )
    admin_host: str = _option(
        Reader("an address or host name", _read_host), "127.0.0.1", "the admin listener's address: health"
    )
    admin_port: int = _option(_PORT, 4002, "the admin listener's port; 0 = off")
    system_prompt: str = _option(
        Reader("a text of at most 32000 characters", _read_prompt),
        "You are a concise technical assistant. Answer in Markdown, briefly and exactly.",
        "sent before each question; empty = none",
    )
    max_tokens: int = _option(_integer(1, 1_000_000), 800, "LLM tokens an answer may have, sent upstream")
    temperature: float = _option(_number(0, 2), 0.3, "sent upstream")
    max_query_chars: int = _option(_integer(1, 100_000), 1000, "code points of a question, after trimming")
    rate_limit: Rate | None = _option(_RATE, Rate(10, 60.0), "requests per seconds and client, a token bucket")
    token_limit: Rate | None = _option(
        Reader("TOKENS/SECONDS, such as 20000/3600, or off", _read_rate),
        None,
        "generated LLM tokens per seconds and client",
    )
    max_streams_per_client: int = _option(_integer(1, 1_000_000), 8, "a client's streams open at once")
    max_streams: int = _option(_integer(1, 1_000_000), 10_000, "all streams open at once")
    trusted_proxies: TrustedProxies = _option(
        Reader("a comma list of addresses, networks and unix", _read_proxies, toml=(str, list)),
        _read_proxies("127.0.0.0/8,::1/128,unix"),
        "peers that may name the client with X-Forwarded-For or X-Real-IP",
    )
    cors_origins: tuple[str, ...] = _option(
        Reader("a comma list of origins such as https://example.com, or *", _read_origins, toml=(str, list)),
        (),
        "origins whose pages may ask; empty = same origin only",
    )
    connect_timeout: float = _option(_seconds(0.01, 300), 5.0, "s to connect upstream, DNS and TLS included")
    first_token_timeout: float = _option(
        _seconds(0.01, 3600), 30.0, "s from the request sent to the first delta with content"
    )
    idle_timeout: float = _option(_seconds(0.01, 3600), 20.0, "s between two such deltas")
    stream_timeout: float = _option(_seconds(0.01, 86_400), 60.0, "s for the whole answer")
    write_timeout: float = _option(
        _seconds(0.01, 3600), 30.0, "s that a client may take no byte while bytes wait for it"
    )
    heartbeat: float = _option(_seconds(0.01, 3600), 15.0, "s of silence before a ping is sent")
    retries: int = _option(_integer(0, 10), 2, "further tries before the first token")
    hedge_after: float | None = _option(
        Reader(f"{_HEDGE.takes}, or off", _read_hedge, toml=(*_HEDGE.toml, str)),
        None,
        "s without a first token after which the next upstream is asked too",
    )
    rescue: str = _option(
        _choice("off", "continue"),
        "off",
        "continue = an answer that its upstream dropped half-way is finished by the next one",
    )
    fast_path: str = _option(
        _choice("auto", "off"),
        "auto",
        "auto = the short cuts through aiohttp that work here; off = its public calls only",
    )
    resume_grace: float = _option(
        Reader(f"{_GRACE.takes}, or finish", _read_grace, toml=(*_GRACE.toml, str)),
        5.0,
        "s that an answer goes on after its last resumable viewer dropped; finish = always to its end",
    )
    resume_window: float = _option(_seconds(0, 86_400), 60.0, "s that a finished answer can still be replayed")
    max_answer_bytes: int = _option(_integer(1024, 1 << 30), 1 << 20, "bytes that one answer's replay log may hold")
    drain_timeout: float = _option(_seconds(0, 86_400), 75.0, "s that SIGTERM lets open streams finish")
    log_format: str = _option(_choice("text", "json", "auto"), "auto", "auto = text on a terminal, else json")
    log_level: str = _option(_choice("debug", "info", "warning", "error"), "info", "the least level that is logged")
    log_prompts: bool = _option(
        Reader("true or false", _read_flag, toml=(bool,)), False, "put questions and answers into the log"
    )

    @property
    def max_message_chars(self) -> int:
        """Code points of one message of a chat: it may hold an answer, and not only a question."""
        return 32 * self.max_query_chars

    @property
    def models(self) -> tuple[str, ...]:
        """Those that can be asked for, the first one where nothing is said."""
        others = [fallback.model for fallback in self.fallbacks if fallback.model]
        return tuple(dict.fromkeys([self.llm_model, *others]))


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as a user meets it."""

    name: str  # in the TOML file
    variable: str  # in the environment
    reader: Reader[Any]
    default: Any
    meaning: str
    secret: bool


def options() -> list[Option]:
    """All settings, in the order in which they are documented."""
    return [
        Option(
            item.name,
            item.name.upper() if item.name.startswith("llm_") else _PREFIX + item.name.upper(),
            item.metadata["reader"],
            item.default,
            item.metadata["meaning"],
            item.metadata["secret"],
        )
        for item in fields(Settings)
    ]


def describe(settings: Settings) -> list[str]:
    """The settings in force, one ``NAME=value`` line each, secrets masked."""
    lines = []
    for option in options():
        value = getattr(settings, option.name)
        shown = ("***" if value else "") if option.secret and isinstance(value, str) else _as_text(value)
        lines.append(f"{option.variable}={shown}")
    return lines


def _as_text(value: Any) -> str:
    match value:
        case None:
            return "off"
        case bool():
            return str(value).lower()
        case math.inf:
            return "finish"
        case float():
            return f"{value:g}"
        case (Fallback(), *_):
            return f"[{','.join(map(str, value))}]"
        case tuple():
            return ",".join(map(str, value))
        case _:
            text = str(value)
            return text if text.isprintable() else repr(text)  # one line, whatever a prompt holds


# ---- Reading


def read_settings(
    environment: Mapping[str, str], *, config: str | None = None, overrides: Mapping[str, str] | None = None
) -> Settings:
    """The settings that the TOML file, the environment and the command line make; the later wins.

    ``config`` is the file's path (else ``SLUICE_CONFIG`` names it); ``overrides`` are texts of the command line by
    field name. Raises Mistakes with a line for each thing that is wrong.
    """
    known = options()
    mistakes: list[str] = []
    found: dict[str, tuple[str, Any, tuple[type, ...]]] = {}  # by name: where it stood, what, and as what it may stand

    path = config or environment.get(CONFIG_VARIABLE)
    if path:
        values = _read_file(path, mistakes)
        _report_unknown(list(values), [option.name for option in known], f" in {_printable(path)}", mistakes)
        for option in known:
            if option.name in values:
                found[option.name] = (f"{option.name} in {_printable(path)}", values[option.name], option.reader.toml)
    for option in known:
        if option.secret and (text := _read_secret(option, environment, mistakes)) is not None:
            found[option.name] = (*text, (str,))
        elif option.variable in environment:
            found[option.name] = (option.variable, environment[option.variable], (str,))
    for name, value in (overrides or {}).items():
        found[name] = (f"--{name.replace('_', '-')}", value, (str,))
    accepted = {option.variable for option in known} | {f"{option.variable}_FILE" for option in known if option.secret}
    strangers = [name for name in environment if name.startswith(_PREFIX) and name != CONFIG_VARIABLE]
    _report_unknown(strangers, sorted(accepted), "", mistakes)

    accepted_values: dict[str, Any] = {}
    for option in known:
        if option.name in found:
            where, value, types = found[option.name]
            try:
                if type(value) not in types:  # exactly: TOML's true is an int to isinstance
                    raise ValueError
                accepted_values[option.name] = option.reader.read(value)
            except ValueError as exc:
                mistakes.append(f"{where}: got {_quote(option, value)}, takes {option.reader.takes}{_because(exc)}")
    if mistakes:
        raise Mistakes(mistakes)
    return Settings(**accepted_values)


def _read_file(path: str, mistakes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(_read_text(path))
    except _Unreadable as exc:
        mistakes.append(f"{_printable(path)}: the configuration file cannot be read ({exc})")
    except tomllib.TOMLDecodeError as exc:
        mistakes.append(f"{_printable(path)}: the configuration file is not TOML ({_printable(str(exc))})")
    except (ValueError, RecursionError):  # an integer of 4301 digits; arrays a thousand deep
        mistakes.append(f"{_printable(path)}: the configuration file is not TOML that can be read")
    return {}


def _read_secret(option: Option, environment: Mapping[str, str], mistakes: list[str]) -> tuple[str, str] | None:
    """A secret's place and value: the variable itself, the file that NAME_FILE names, or systemd's credential."""
    file_variable = f"{option.variable}_FILE"
    if option.variable in environment:
        if file_variable in environment:
            mistakes.append(f"{file_variable}: {option.variable} is set too; takes one of the two")
        return option.variable, environment[option.variable]
    if file_variable in environment:
        path, where = environment[file_variable], file_variable
    elif directory := environment.get("CREDENTIALS_DIRECTORY"):
        path, where = f"{directory}/{option.name}", f"the credential {option.name}"
    else:
        return None
    try:
        return where, _read_text(path)
    except _Unreadable as exc:
        if where == file_variable or not exc.absent:  # systemd's directory may hold other credentials only
            mistakes.append(f"{where}: {_printable(path)} cannot be read ({exc}); takes the path of a readable file")
    return None


class _Unreadable(Exception):
    """A file that cannot be read; ``str()`` says why. ``absent``: because there is none."""

    def __init__(self, reason: str, *, absent: bool = False) -> None:
        super().__init__(reason)
        self.absent = absent


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise _Unreadable(str(exc.strerror), absent=isinstance(exc, FileNotFoundError)) from exc
    except UnicodeDecodeError as exc:
        raise _Unreadable("it is not UTF-8") from exc
    except ValueError as exc:  # NUL, or what no file name can be
        raise _Unreadable("it is no path") from exc


def _report_unknown(names: list[str], known: list[str], where: str, mistakes: list[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; run.py --help lists those that there are"
            mistakes.append(f"{_printable(name)}{where}: no such setting{hint}")


def _quote(option: Option, value: Any) -> str:
    if option.secret:
        return "a value that is not shown"
    if option.name == "llm_base_url" and "@" in str(value):
        return "a URL with '@' in it"  # what stands before it may be a password
    return _printable(repr(value))


def _because(exc: Exception) -> str:
    # Only our own words: a library's may quote the value.
    reason = str(exc) if type(exc) is ValueError and exc.args and str(exc).startswith(("it ", "its ")) else ""
    return f"; {reason}" if reason else ""


def _printable(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else text[:117] + "..."
