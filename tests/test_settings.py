"""The settings: contract, section 2, whose table stands here as data, copied by hand."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.settings import Fallback, Mistakes, Rate, Settings, TrustedProxies, describe, options, read_settings

SECRET: Final = "sk-canary-0123456789"
SECRETS: Final = ["LLM_API_KEY", "SLUICE_FALLBACKS"]  # the settings that hold one

LOOPBACK: Final = TrustedProxies(
    (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
    unix=True,
)

# The contract's table: variable, name in the file, default.
TABLE: Final = [
    ("LLM_BASE_URL", "llm_base_url", ""),
    ("LLM_API_KEY", "llm_api_key", ""),
    ("LLM_MODEL", "llm_model", "gpt-4o-mini"),
    ("SLUICE_FALLBACKS", "fallbacks", ()),
    ("SLUICE_HOST", "host", "127.0.0.1"),
    ("SLUICE_PORT", "port", 4001),
    ("SLUICE_SOCKET", "socket", ""),
    ("SLUICE_ADMIN_HOST", "admin_host", "127.0.0.1"),
    ("SLUICE_ADMIN_PORT", "admin_port", 4002),
    ("SLUICE_MAX_TOKENS", "max_tokens", 800),
    ("SLUICE_TEMPERATURE", "temperature", 0.3),
    ("SLUICE_MAX_QUERY_CHARS", "max_query_chars", 1000),
    ("SLUICE_RATE_LIMIT", "rate_limit", Rate(10, 60.0)),
    ("SLUICE_TOKEN_LIMIT", "token_limit", None),
    ("SLUICE_MAX_STREAMS_PER_CLIENT", "max_streams_per_client", 8),
    ("SLUICE_MAX_STREAMS", "max_streams", 10_000),
    ("SLUICE_TRUSTED_PROXIES", "trusted_proxies", LOOPBACK),
    ("SLUICE_CORS_ORIGINS", "cors_origins", ()),
    ("SLUICE_CONNECT_TIMEOUT", "connect_timeout", 5.0),
    ("SLUICE_FIRST_TOKEN_TIMEOUT", "first_token_timeout", 30.0),
    ("SLUICE_IDLE_TIMEOUT", "idle_timeout", 20.0),
    ("SLUICE_STREAM_TIMEOUT", "stream_timeout", 60.0),
    ("SLUICE_WRITE_TIMEOUT", "write_timeout", 30.0),
    ("SLUICE_HEARTBEAT", "heartbeat", 15.0),
    ("SLUICE_RETRIES", "retries", 2),
    ("SLUICE_HEDGE_AFTER", "hedge_after", None),
    ("SLUICE_RESCUE", "rescue", "off"),
    ("SLUICE_FAST_PATH", "fast_path", "auto"),
    ("SLUICE_RESUME_GRACE", "resume_grace", 5.0),
    ("SLUICE_RESUME_WINDOW", "resume_window", 60.0),
    ("SLUICE_MAX_ANSWER_BYTES", "max_answer_bytes", 1_048_576),
    ("SLUICE_DRAIN_TIMEOUT", "drain_timeout", 75.0),
    ("SLUICE_LOG_FORMAT", "log_format", "auto"),  # text on a terminal, else json
    ("SLUICE_LOG_LEVEL", "log_level", "info"),
    ("SLUICE_LOG_PROMPTS", "log_prompts", False),
]
VARIABLES: Final = [variable for variable, _, _ in TABLE] + ["SLUICE_SYSTEM_PROMPT"]

# Settings of the contract that no code obeys yet: to accept them would be to promise what does not happen.
LATER: Final = [
    "SLUICE_WORKERS",
    "SLUICE_REDIS_URL",
    "SLUICE_API_KEYS_FILE",
    "SLUICE_JWT_SECRET",
    "SLUICE_JWKS_FILE",
    "SLUICE_JWT_AUDIENCE",
]


def mistakes_of(environment: Mapping[str, str], **options: Any) -> list[str]:
    """The lines that the environment's mistakes make; each must be one line, whatever stands in it."""
    with pytest.raises(Mistakes) as caught:
        read_settings(environment, **options)
    assert caught.value.lines
    for line in caught.value.lines:
        assert line.isprintable(), repr(line)
        assert len(line) < 600
    return caught.value.lines


def toml(directory: Path, text: str) -> str:
    path = directory / "sluice.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- Names and defaults


@pytest.mark.parametrize(("variable", "name", "default"), TABLE, ids=[row[0] for row in TABLE])
def test_each_setting_has_its_default(variable: str, name: str, default: object) -> None:
    """Section 2, column "default"."""
    value = getattr(read_settings({}), name)
    assert value == default
    assert type(value) is type(default)


def test_the_default_prompt_asks_for_a_concise_technical_assistant() -> None:
    prompt = read_settings({}).system_prompt
    assert "concise" in prompt
    assert "technical assistant" in prompt


def test_there_is_no_setting_beside_the_contract() -> None:
    assert sorted(option.variable for option in options()) == sorted(VARIABLES)
    assert [option.name for option in options()] == [field.name for field in dataclasses.fields(Settings)]


def test_the_file_has_the_names_in_lower_case_and_without_prefix() -> None:
    """Section 2: ``llm_base_url``, ``rate_limit``."""
    names = {option.variable: option.name for option in options()}
    assert names == {variable: variable.removeprefix("SLUICE_").lower() for variable in VARIABLES}


# For each setting: a text of the environment, the same in TOML, and the value that both give.
GOOD: Final = [
    ("LLM_BASE_URL", "https://api.openai.com/v1", '"https://api.openai.com/v1"', "https://api.openai.com/v1"),
    ("LLM_BASE_URL", " http://[::1]:8080/v1/ ", '"http://[::1]:8080/v1/"', "http://[::1]:8080/v1"),
    ("LLM_BASE_URL", "", '""', ""),
    ("LLM_API_KEY", f"{SECRET}\n", f'"{SECRET}"', SECRET),
    ("LLM_MODEL", "meta/llama-3:70b", '"meta/llama-3:70b"', "meta/llama-3:70b"),
    (
        "SLUICE_FALLBACKS",
        f'[{{"base_url":"http://b/v1/"}},{{"base_url":"https://c","api_key":"{SECRET}","model":"m"}}]',
        f'[{{base_url="http://b/v1/"}},{{base_url="https://c",api_key="{SECRET}",model="m"}}]',
        (Fallback("http://b/v1"), Fallback("https://c", SECRET, "m")),
    ),
    ("SLUICE_FALLBACKS", "", "[]", ()),
    ("SLUICE_HEDGE_AFTER", "off", '"off"', None),
    ("SLUICE_HEDGE_AFTER", "1.5", "1.5", 1.5),
    ("SLUICE_RESCUE", "continue", '"continue"', "continue"),
    ("SLUICE_HOST", "::", '"::"', "::"),
    ("SLUICE_HOST", "fe80::1%eth0", '"fe80::1%eth0"', "fe80::1%eth0"),
    ("SLUICE_PORT", "0", "0", 0),
    ("SLUICE_PORT", "65535", "65535", 65535),
    ("SLUICE_SOCKET", "/run/sluice/s.sock", '"/run/sluice/s.sock"', "/run/sluice/s.sock"),
    ("SLUICE_ADMIN_HOST", "localhost", '"localhost"', "localhost"),
    ("SLUICE_ADMIN_PORT", "0", "0", 0),
    ("SLUICE_SYSTEM_PROMPT", "", '""', ""),
    ("SLUICE_SYSTEM_PROMPT", "Zeile 1\nzwei 😀", '"Zeile 1\\nzwei 😀"', "Zeile 1\nzwei 😀"),
    ("SLUICE_MAX_TOKENS", "1", "1", 1),
    ("SLUICE_TEMPERATURE", "2", "2", 2.0),
    ("SLUICE_TEMPERATURE", "0.75", "0.75", 0.75),
    ("SLUICE_MAX_QUERY_CHARS", "5000", "5000", 5000),
    ("SLUICE_RATE_LIMIT", "100/0.5", '"100/0.5"', Rate(100, 0.5)),
    ("SLUICE_RATE_LIMIT", "off", '"off"', None),
    ("SLUICE_TOKEN_LIMIT", "20000/3600", '"20000/3600"', Rate(20_000, 3600.0)),
    ("SLUICE_TOKEN_LIMIT", "off", '"off"', None),
    ("SLUICE_MAX_STREAMS_PER_CLIENT", "1", "1", 1),
    ("SLUICE_MAX_STREAMS", "1000000", "1000000", 1_000_000),
    ("SLUICE_TRUSTED_PROXIES", "", "[]", TrustedProxies((), unix=False)),
    (
        "SLUICE_TRUSTED_PROXIES",
        "10.0.0.0/8, unix",
        '["10.0.0.0/8", "unix"]',
        TrustedProxies((ipaddress.ip_network("10.0.0.0/8"),), unix=True),
    ),
    ("SLUICE_CORS_ORIGINS", "*", '"*"', ("*",)),
    (
        "SLUICE_CORS_ORIGINS",
        "https://a.example, http://b.example:8080",
        '["https://a.example", "http://b.example:8080"]',
        ("https://a.example", "http://b.example:8080"),
    ),
    ("SLUICE_CONNECT_TIMEOUT", "2.5", "2.5", 2.5),
    ("SLUICE_FIRST_TOKEN_TIMEOUT", "90", "90", 90.0),
    ("SLUICE_IDLE_TIMEOUT", ".5", "0.5", 0.5),
    ("SLUICE_STREAM_TIMEOUT", "3600", "3.6e3", 3600.0),
    ("SLUICE_WRITE_TIMEOUT", "0.1", "0.1", 0.1),
    ("SLUICE_HEARTBEAT", "15.", "15.0", 15.0),
    ("SLUICE_RETRIES", "0", "0", 0),
    ("SLUICE_FAST_PATH", "off", '"off"', "off"),
    ("SLUICE_FAST_PATH", "auto", '"auto"', "auto"),
    ("SLUICE_RESUME_GRACE", "0", "0", 0.0),
    ("SLUICE_RESUME_GRACE", "2.5", "2.5", 2.5),
    ("SLUICE_RESUME_GRACE", "finish", '"finish"', math.inf),
    ("SLUICE_RESUME_WINDOW", "0", "0", 0.0),
    ("SLUICE_MAX_ANSWER_BYTES", "4096", "4_096", 4096),
    ("SLUICE_DRAIN_TIMEOUT", "0", "0", 0.0),
    ("SLUICE_LOG_FORMAT", "text", '"text"', "text"),
    ("SLUICE_LOG_LEVEL", "debug", '"debug"', "debug"),
    ("SLUICE_LOG_PROMPTS", "true", "true", True),
    ("SLUICE_LOG_PROMPTS", "false", "false", False),
]


def test_every_setting_has_an_example_here() -> None:
    assert {variable for variable, *_ in GOOD} == set(VARIABLES)


@pytest.mark.parametrize(("variable", "text", "_", "value"), GOOD, ids=[f"{row[0]}={row[1]}" for row in GOOD])
def test_the_environment_sets_it(variable: str, text: str, _: str, value: object) -> None:
    """Section 2: environment variables; seconds may have fractions."""
    name = variable.removeprefix("SLUICE_").lower()
    assert getattr(read_settings({variable: text}), name) == value


@pytest.mark.parametrize(("variable", "_", "text", "value"), GOOD, ids=[f"{row[0]}={row[2]}" for row in GOOD])
def test_the_file_sets_it(variable: str, _: str, text: str, value: object, tmp_path: Path) -> None:
    """Section 2: a TOML file with the same names."""
    name = variable.removeprefix("SLUICE_").lower()
    assert getattr(read_settings({}, config=toml(tmp_path, f"{name} = {text}\n")), name) == value


def test_settings_cannot_be_changed() -> None:
    """One frozen value (style, point 12)."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_settings({}).port = 1  # type: ignore[misc]


def test_variables_of_others_are_none_of_our_business() -> None:
    """Only SLUICE_ is ours: LLM_ is shared with other programs."""
    assert read_settings({"PATH": "/bin", "LLM_TIMEOUT": "x", "sluice_port": "x", "PORT": "x"}) == read_settings({})


# ---- Mistakes

# What a setting does not take, as text of the environment.
BAD: Final = {
    "LLM_BASE_URL": [
        "api.openai.com/v1",
        "ftp://api.example/v1",
        "file:///etc/passwd",
        "http://",
        "http:///v1",
        "https://:443/v1",
        "http://host:99999/v1",
        "http://host:0/v1",
        "http://host:port/v1",
        "http://[::1/v1",
        "http://[]@",
        "https://user:password@host/v1",
        "https://user@host/v1",
        "https://host/v1?api-version=1",
        "https://host/v1?",
        "https://host/v1#x",
        "http://ho st/v1",
        "http://host/v\n1",
        "http://\udcff/v1",
    ],
    "LLM_API_KEY": [f"{SECRET} x", f"{SECRET}\r\nX-Evil: 1", f"{SECRET}é", f"\0{SECRET}", f"{SECRET}\udcff"],
    "LLM_MODEL": ["", " ", "a\nb", "x" * 201, "\udcff"],
    "SLUICE_FALLBACKS": [
        "http://b/v1",
        "{}",
        '[""]',
        "[{}]",
        '[{"base_url":""}]',
        '[{"base_url":"ftp://b/v1"}]',
        '[{"base_url":"http://b/v1","key":"x"}]',
        f'[{{"base_url":"http://b/v1","api_key":"{SECRET} x"}}]',
        '[{"base_url":"http://b/v1","model":""}]',
        '[{"base_url":"http://b/v1","model":null}]',
        "[" * 100_000,
    ],
    "SLUICE_HEDGE_AFTER": ["", "0", "on", "3601"],
    "SLUICE_HOST": ["", "a b", "http://host", "host/", "[::1]", "x" * 254],
    "SLUICE_PORT": ["", "-1", "65536", "4001.0", "0x1", "4 001", "\uff14\uff10", "4e3", "9" * 5000, "true", "None"],
    "SLUICE_SOCKET": ["/" + "x" * 107, "/a\0b", "/" + "é" * 54],
    "SLUICE_ADMIN_HOST": [""],
    "SLUICE_ADMIN_PORT": ["off", "70000"],
    "SLUICE_SYSTEM_PROMPT": ["x" * 32_001, "a\0b", "\udcff"],
    "SLUICE_MAX_TOKENS": ["0", "-5", "1000001", "", "many"],
    "SLUICE_TEMPERATURE": ["-0.1", "2.1", "nan", "inf", "-inf", "1e1", "0,3", ""],
    "SLUICE_MAX_QUERY_CHARS": ["0", "100001"],
    "SLUICE_RATE_LIMIT": ["", "10", "10/0", "0/60", "-1/60", "10/60/1", "10 / 60", "1e1/60", "10/1e9", "OFF", "10/nan"],
    "SLUICE_TOKEN_LIMIT": ["", "20000", "0/3600"],
    "SLUICE_MAX_STREAMS_PER_CLIENT": ["0", "1000001"],
    "SLUICE_MAX_STREAMS": ["0", "x"],
    "SLUICE_TRUSTED_PROXIES": ["10.0.0.1/8", "10.0.0.0/33", "nginx", "unix,,x", "::1/129"],
    "SLUICE_CORS_ORIGINS": [
        "example.com",
        "https://example.com/",
        "https://EXAMPLE.com",
        "https://example.com:443",
        "https://a.example,*",
        "null",
        "https://user@example.com",
        "https://bücher.example",
        "ftp://example.com",
        "https://a.example https://b.example",
    ],
    "SLUICE_CONNECT_TIMEOUT": ["0", "-1", "301", "nan", "5s", ""],
    "SLUICE_FIRST_TOKEN_TIMEOUT": ["0", "3601"],
    "SLUICE_IDLE_TIMEOUT": ["0", "3601"],
    "SLUICE_STREAM_TIMEOUT": ["0", "86401"],
    "SLUICE_WRITE_TIMEOUT": ["0", "3601"],
    "SLUICE_HEARTBEAT": ["0", "3601"],
    "SLUICE_RETRIES": ["-1", "11", "1.5"],
    "SLUICE_RESCUE": ["", "on", "true", "Continue"],
    "SLUICE_FAST_PATH": ["", "on", "true", "Auto"],
    "SLUICE_RESUME_GRACE": ["", "-1", "86401", "inf", "off", "Finish"],
    "SLUICE_RESUME_WINDOW": ["-1", "86401", "finish"],
    "SLUICE_MAX_ANSWER_BYTES": ["1023", "1073741825", "1MiB"],
    "SLUICE_DRAIN_TIMEOUT": ["-1", "86401", "inf"],
    "SLUICE_LOG_FORMAT": ["", "JSON", "xml"],
    "SLUICE_LOG_LEVEL": ["", "INFO", "trace", "20"],
    "SLUICE_LOG_PROMPTS": ["", "True", "1", "yes"],
}
BAD_PAIRS: Final = [(variable, text) for variable, texts in BAD.items() for text in texts]


def test_every_setting_has_a_mistake_here() -> None:
    assert set(BAD) == set(VARIABLES)


@pytest.mark.parametrize(("variable", "text"), BAD_PAIRS, ids=[f"{name}={text[:30]!r}" for name, text in BAD_PAIRS])
def test_a_mistake_is_one_line_that_names_variable_value_and_what_it_takes(variable: str, text: str) -> None:
    """Section 2: one line per mistake naming the variable, what it got and what it takes."""
    takes = next(option.reader.takes for option in options() if option.variable == variable)
    (line,) = mistakes_of({variable: text})
    assert line.startswith(f"{variable}: got ")
    assert takes in line
    if variable in SECRETS:
        assert SECRET not in line
    elif "@" not in text:
        assert repr(text)[:80] in line


# Wrong types in the file, and values that only a file can have.
WRONG_TOML: Final = [
    ("port", '"4001"'),
    ("port", "4001.0"),
    ("port", "true"),
    ("port", "[4001]"),
    ("port", "2024-01-01"),
    ("max_tokens", "9" * 400),
    ("retries", "false"),
    ("temperature", '"0.3"'),
    ("temperature", "true"),
    ("temperature", "nan"),
    ("heartbeat", "inf"),
    ("heartbeat", '"15"'),
    ("drain_timeout", "-inf"),
    ("connect_timeout", "9" * 400),
    ("log_prompts", '"true"'),
    ("log_prompts", "1"),
    ("log_level", "20"),
    ("log_level", '["info"]'),
    ("log_format", "{}"),
    ("host", "127"),
    ("socket", "false"),
    ("socket", '"/a\\u0000b"'),
    ("llm_model", "4"),
    ("llm_model", '["gpt-4o-mini"]'),
    ("llm_base_url", "false"),
    ("llm_base_url", '["https://u:p@host"]'),
    ("system_prompt", "[]"),
    ("rate_limit", "10"),
    ("rate_limit", "false"),
    ("rate_limit", "[10, 60]"),
    ("trusted_proxies", "[127]"),
    ("trusted_proxies", "true"),
    ("cors_origins", '[["*"]]'),
    ("cors_origins", "{a = 1}"),
]


@pytest.mark.parametrize(("name", "text"), WRONG_TOML, ids=[f"{name}={text[:20]}" for name, text in WRONG_TOML])
def test_the_file_has_types_and_they_count(name: str, text: str, tmp_path: Path) -> None:
    """Section 2: a value of the wrong type. In the environment all is text; TOML tells 4001 from "4001"."""
    path = toml(tmp_path, f"{name} = {text}\n")
    takes = next(option.reader.takes for option in options() if option.name == name)
    (line,) = mistakes_of({}, config=path)
    assert line.startswith(f"{name} in {path}: got ")
    assert takes in line
    assert "u:p" not in line


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """Whoever has made three repairs them in one go (row L7)."""
    path = toml(tmp_path, 'retries = "2"\nport = 1\nhots = "::"\n')
    lines = mistakes_of(
        {"SLUICE_PORT": "x", "SLUICE_HEARTBEAT": "0", "SLUICE_PROT": "1", "LLM_BASE_URL": "nowhere"},
        config=path,
        overrides={"host": "a b"},
    )
    assert sorted(line.partition(":")[0] for line in lines) == sorted(
        [f"{name} in {path}" for name in ("retries", "hots")]
        + ["SLUICE_PORT", "SLUICE_HEARTBEAT", "SLUICE_PROT", "LLM_BASE_URL", "--host"]
    )


def test_a_mistake_says_which_origin_of_many_is_wrong() -> None:
    (line,) = mistakes_of({"SLUICE_CORS_ORIGINS": "https://a.example,https://b.example/"})
    assert line.endswith("; it has 'https://b.example/', which is no origin as browsers write it")


def test_a_long_value_is_shown_by_its_beginning() -> None:
    (line,) = mistakes_of({"SLUICE_SYSTEM_PROMPT": "x" * 40_000})
    assert len(line) < 300


# ---- Unknown names


@pytest.mark.parametrize("variable", LATER)
def test_a_setting_that_no_code_obeys_yet_is_refused(variable: str, tmp_path: Path) -> None:
    """A limit or a lock that is silently absent is worse than a process that does not start."""
    (line,) = mistakes_of({variable: "x"})
    assert line.startswith(f"{variable}: no such setting")
    name = variable.removeprefix("SLUICE_").lower()
    (line,) = mistakes_of({}, config=toml(tmp_path, f'{name} = "x"\n'))
    assert line.startswith(f"{name} in ")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("SLUICE_PROT", "SLUICE_PORT"),
        ("SLUICE_RATELIMIT", "SLUICE_RATE_LIMIT"),
        ("SLUICE_CORS_ORIGIN", "SLUICE_CORS_ORIGINS"),
        ("SLUICE_MAX_STREAM", "SLUICE_MAX_STREAMS"),
        ("SLUICE_HEARTBEAT_", "SLUICE_HEARTBEAT"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_one_that_was_meant(written: str, meant: str) -> None:
    (line,) = mistakes_of({written: "1"})
    assert line == f"{written}: no such setting; did you mean {meant}?"


def test_a_name_like_no_other_is_refused_with_the_way_to_the_list() -> None:
    (line,) = mistakes_of({"SLUICE_XYZZYQQ": "1"})
    assert line == "SLUICE_XYZZYQQ: no such setting; run.py --help lists those that there are"


def test_the_value_of_an_unknown_name_is_not_shown(tmp_path: Path) -> None:
    """It may be a secret whose name is misspelt."""
    lines = mistakes_of({"SLUICE_LLM_API_KEY": SECRET}, config=toml(tmp_path, f'llm_api_kye = "{SECRET}"\n'))
    assert SECRET not in "".join(lines)
    assert any("did you mean llm_api_key?" in line for line in lines)


@pytest.mark.parametrize("name", ["SLUICE_A\nB", "SLUICE_\x1b[31m", "SLUICE_\udcff", "SLUICE_" + "x" * 5000])
def test_an_unknown_name_does_not_break_its_line(name: str) -> None:
    mistakes_of({name: "1"})


# ---- Which wins


def test_command_line_beats_environment_beats_file(tmp_path: Path) -> None:
    """Section 2: the environment wins over the file; what is typed now wins over both."""
    path = toml(tmp_path, 'port = 1\nhost = "file"\nllm_model = "file"\n')
    environment = {"SLUICE_PORT": "2", "SLUICE_HOST": "environment"}
    settings = read_settings(environment, config=path, overrides={"port": "3"})
    assert (settings.port, settings.host, settings.llm_model) == (3, "environment", "file")


def test_a_mistake_that_is_overruled_does_no_harm(tmp_path: Path) -> None:
    path = toml(tmp_path, 'port = "x"\n')
    assert read_settings({"SLUICE_PORT": "2"}, config=path).port == 2
    assert read_settings({"SLUICE_PORT": "x"}, overrides={"port": "3"}).port == 3


def test_the_command_line_is_read_as_strictly() -> None:
    (line,) = mistakes_of({}, overrides={"port": "x"})
    assert line == "--port: got 'x', takes an integer from 0 to 65535"


# ---- The file


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    """Section 2: ``--config``, or ``SLUICE_CONFIG``."""
    assert read_settings({"SLUICE_CONFIG": toml(tmp_path, "port = 1\n")}).port == 1


def test_the_file_of_the_command_line_wins(tmp_path: Path) -> None:
    """And the other is not even opened."""
    assert read_settings({"SLUICE_CONFIG": "/nowhere"}, config=toml(tmp_path, "port = 1\n")).port == 1


def test_the_file_cannot_name_another(tmp_path: Path) -> None:
    (line,) = mistakes_of({}, config=toml(tmp_path, 'config = "x"\n'))
    assert line.startswith("config in ")


BROKEN_FILES: Final = {
    "not TOML": b"port 4001\n",
    "cut": b'host = "127',
    "twice": b"port = 1\nport = 2\n",
    "not UTF-8": b'host = "\xff"\n',
    "UTF-16": 'host = "a"\n'.encode("utf-16"),
    "NUL": b'host = "a\0"\n',
    "5000 digits": b"port = " + b"9" * 5000 + b"\n",
    "nested a thousand deep": b"port = " + b"[" * 100_000 + b"\n",
    "an escape in a line": b"port = \x1b[31m\n",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_one_mistake(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sluice.toml"
    path.write_bytes(content)
    (line,) = mistakes_of({}, config=str(path))
    assert line.startswith(f"{path}: the configuration file ")


@pytest.mark.parametrize(
    "path", ["/nowhere/sluice.toml", "/", "/etc/passwd/x", "/" + "x" * 5000, "a\0b", "a\nb", "\udcff"]
)
def test_an_unreadable_file_is_one_mistake(path: str) -> None:
    (line,) = mistakes_of({"SLUICE_CONFIG": path})
    assert "the configuration file cannot be read" in line


def test_a_broken_file_does_not_hide_the_mistakes_beside_it() -> None:
    assert len(mistakes_of({"SLUICE_CONFIG": "/nowhere", "SLUICE_PORT": "x"})) == 2


def test_tables_are_no_settings(tmp_path: Path) -> None:
    (line,) = mistakes_of({}, config=toml(tmp_path, "[server]\nport = 1\n"))
    assert line.startswith("server in ")


# ---- Secrets


def test_a_secret_can_come_from_a_file(tmp_path: Path) -> None:
    """Section 2: ``NAME_FILE=/path``; editors end a file with a newline."""
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    assert read_settings({"LLM_API_KEY_FILE": str(path)}).llm_api_key == SECRET


def test_a_secret_can_come_from_systemd(tmp_path: Path) -> None:
    """Section 2: ``$CREDENTIALS_DIRECTORY/`` + the TOML name."""
    (tmp_path / "llm_api_key").write_text(f"{SECRET}\n")
    assert read_settings({"CREDENTIALS_DIRECTORY": str(tmp_path)}).llm_api_key == SECRET


@pytest.mark.parametrize("directory", ["", "/nowhere", "/" + "x" * 200])
def test_a_service_may_have_credentials_that_are_not_for_us(directory: str) -> None:
    assert read_settings({"CREDENTIALS_DIRECTORY": directory}).llm_api_key == ""


def test_where_a_secret_is_looked_for_first(tmp_path: Path) -> None:
    """The variable itself, then its file, then systemd's, then the configuration file."""
    for name in ("llm_api_key", "by-file"):
        (tmp_path / name).write_text(name)
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    config = toml(tmp_path, 'llm_api_key = "by-toml"\n')
    assert read_settings({}, config=config).llm_api_key == "by-toml"
    assert read_settings(environment, config=config).llm_api_key == "llm_api_key"
    environment["LLM_API_KEY_FILE"] = str(tmp_path / "by-file")
    assert read_settings(environment, config=config).llm_api_key == "by-file"
    del environment["LLM_API_KEY_FILE"]
    assert read_settings(environment | {"LLM_API_KEY": "itself"}, config=config).llm_api_key == "itself"


def test_a_secret_given_twice_is_a_mistake() -> None:
    """Nobody could say which of them is the old one."""
    (line,) = mistakes_of({"LLM_API_KEY": SECRET, "LLM_API_KEY_FILE": "/nowhere"})
    assert line.startswith("LLM_API_KEY_FILE: ")


@pytest.mark.parametrize("path", ["", "/", "/nowhere", "/etc/passwd/x", "a\0b", "a\nb", "\udcff", "/" + "x" * 5000])
def test_a_secret_that_cannot_be_read_is_one_mistake(path: str) -> None:
    """Row L7: an unreadable key file."""
    (line,) = mistakes_of({"LLM_API_KEY_FILE": path})
    assert line.startswith("LLM_API_KEY_FILE: ")
    assert line.endswith("takes the path of a readable file")


def test_a_secret_that_is_no_text_is_one_mistake(tmp_path: Path) -> None:
    (tmp_path / "llm_api_key").write_bytes(b"\xff\xfe")
    (line,) = mistakes_of({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert line.startswith("the credential llm_api_key: ")


def test_a_secret_in_the_wrong_form_is_not_shown(tmp_path: Path) -> None:
    """Row S10, for each place it can come from."""
    (tmp_path / "llm_api_key").write_text(f"{SECRET}\nanother line\n")
    places: list[tuple[dict[str, str], str | None]] = [
        ({"LLM_API_KEY": f"{SECRET} x"}, None),
        ({"LLM_API_KEY_FILE": str(tmp_path / "llm_api_key")}, None),
        ({"CREDENTIALS_DIRECTORY": str(tmp_path)}, None),
        ({}, toml(tmp_path, f'llm_api_key = ["{SECRET}"]\n')),
    ]
    for environment, config in places:
        (line,) = mistakes_of(environment, config=config)
        assert SECRET not in line
        assert "takes a key of printable ASCII" in line


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host/v1", f"https://{SECRET}@host/v1", f"x@{SECRET}"])
def test_a_password_in_the_url_is_refused_and_not_shown(url: str) -> None:
    """The URL is shown by --check; a key belongs into LLM_API_KEY."""
    (line,) = mistakes_of({"LLM_BASE_URL": url})
    assert SECRET not in line


def test_a_secret_stands_in_no_repr_and_no_description() -> None:
    """Row S10."""
    settings = read_settings({"LLM_API_KEY": SECRET})
    assert settings.llm_api_key == SECRET
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert "LLM_API_KEY=***" in describe(settings)
    assert SECRET not in "".join(describe(settings))


def test_only_keys_are_secrets() -> None:
    assert [option.variable for option in options() if option.secret] == SECRETS


@pytest.mark.parametrize("variable", ["SLUICE_PORT_FILE", "SLUICE_SYSTEM_PROMPT_FILE"])
def test_only_a_secret_can_come_from_a_file_of_its_own(variable: str) -> None:
    (line,) = mistakes_of({variable: "/etc/hostname"})
    assert "no such setting" in line


# ---- The description


def test_the_description_has_a_line_for_each_setting() -> None:
    lines = describe(read_settings({}))
    assert [line.partition("=")[0] for line in lines] == [option.variable for option in options()]
    assert {"SLUICE_TOKEN_LIMIT=off", "SLUICE_RESUME_GRACE=5"} < set(lines)
    assert "SLUICE_RESUME_GRACE=finish" in describe(read_settings({"SLUICE_RESUME_GRACE": "finish"}))
    assert {"SLUICE_RATE_LIMIT=10/60", "SLUICE_LOG_PROMPTS=false", "SLUICE_HEARTBEAT=15", "LLM_API_KEY="} < set(lines)
    assert "SLUICE_TRUSTED_PROXIES=127.0.0.0/8,::1/128,unix" in lines


@pytest.mark.parametrize(("variable", "text", "_", "__"), GOOD, ids=[f"{row[0]}={row[1]}" for row in GOOD])
def test_a_description_is_one_line_a_setting_and_reads_back(variable: str, text: str, _: str, __: object) -> None:
    """What --check prints can be put into an environment file, but for the secret and texts of several lines."""
    settings = read_settings({variable: text})
    lines = describe(settings)
    assert all(line.isprintable() for line in lines)
    told = dict(line.split("=", 1) for line in lines)
    if SECRET not in text and "\n" not in text:
        assert read_settings(told) == settings


# ---- Whatever stands there

UNHURRIED: Final = settings(deadline=None)  # a busy machine is no failure

ANY_TEXT: Final = st.text(st.characters(codec=None), max_size=60) | st.text("0123456789./:@off,*[]-+e ", max_size=30)
EVERY_VARIABLE: Final = [*VARIABLES, "LLM_API_KEY_FILE", "CREDENTIALS_DIRECTORY", "SLUICE_CONFIG", "SLUICE_X"]


def read_or_refuse(environment: Mapping[str, str], config: str | None = None) -> None:
    """Nothing but Mistakes comes out, each of one line; what is accepted can be described."""
    try:
        lines = describe(read_settings(environment, config=config))
    except Mistakes as mistakes:
        lines = mistakes.lines
    assert lines
    assert all(line.isprintable() for line in lines)


@UNHURRIED
@given(environment=st.dictionaries(st.sampled_from(EVERY_VARIABLE), ANY_TEXT, max_size=4))
def test_no_text_makes_anything_but_mistakes(environment: dict[str, str]) -> None:
    """Section 2: the process exits with 2 and a line per mistake, never with a traceback."""
    read_or_refuse(environment)


@UNHURRIED
@given(host=ANY_TEXT, rest=ANY_TEXT, scheme=st.sampled_from(["http://", "https://"]))
def test_no_url_makes_anything_but_mistakes(host: str, rest: str, scheme: str) -> None:
    read_or_refuse({"LLM_BASE_URL": f"{scheme}{host}{rest}", "SLUICE_CORS_ORIGINS": f"{scheme}{host}"})


TOML_VALUES: Final = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    lambda values: st.lists(values, max_size=3),
    max_leaves=5,
)


@UNHURRIED
@given(values=st.dictionaries(st.sampled_from([option.name for option in options()]), TOML_VALUES, max_size=3))
def test_no_value_of_the_file_makes_anything_but_mistakes(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    # JSON is TOML for these values, but for the names of what is no finite number.
    text = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    path.write_text(text.replace("NaN", "nan").replace("Infinity", "inf"), encoding="utf-8")
    read_or_refuse({}, str(path))


@UNHURRIED
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_no_file_makes_anything_but_mistakes(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_text(text, encoding="utf-8")
    read_or_refuse({}, str(path))
