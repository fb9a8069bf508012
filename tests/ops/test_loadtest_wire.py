"""What the load tester sends and reads: HTTP responses, both event streams, URLs, prompts and its own command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.loadtest.answers import AnswerReader, OpenAIReader, Said, SluiceReader, refusal_code
from ops.loadtest.http1 import BadResponse, ResponseParser
from ops.loadtest.options import BadOptions, Options, read_options
from ops.loadtest.prompts import BadPrompts, Prompt, read_prompts
from ops.loadtest.target import BadTarget, Kind, read_target
from server.wire.sse import EventStreamParser
from tests.sluice_process import ROOT

# ---- HTTP/1.1

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
RESPONSES = {
    "chunked": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;ext=1\r\n wor\r\n\r\n0\r\nX-T: 1\r\n\r\n",
        True,
    ),
    "with a length": (HEAD + b"Content-Length: 11\r\n\r\nhello wor\r\n", True),
    "until close": (HEAD + b"\r\nhello wor\r\n", False),
    "after interim ones": (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        + HEAD
        + b"Content-Length: 11\r\n\r\nhello wor\r\n",
        True,
    ),
    "connection: close": (HEAD + b"Connection: close\r\nContent-Length: 11\r\n\r\nhello wor\r\n", False),
}


@pytest.mark.parametrize(("response", "reusable"), RESPONSES.values(), ids=RESPONSES)
def test_a_response_does_not_depend_on_where_the_network_cuts(response: bytes, reusable: bool) -> None:
    for cut in range(len(response) + 1):
        parser = ResponseParser()
        payload = parser.feed(response[:cut]) + parser.feed(response[cut:])
        parser.feed_eof()
        assert (parser.status, payload, parser.ended, parser.reusable) == (200, b"hello wor\r\n", True, reusable), cut
        assert parser.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_some_responses_have_no_body(status: bytes) -> None:
    """RFC 9112, 6.3."""
    parser = ResponseParser()
    parser.feed(b"HTTP/1.1 " + status + b"\r\n\r\n")
    assert parser.ended


def test_a_body_cut_short_has_not_ended() -> None:
    for response, _ in (RESPONSES["chunked"], RESPONSES["with a length"]):
        parser = ResponseParser()
        parser.feed(response[:-3])
        parser.feed_eof()
        assert not parser.ended


def test_bytes_behind_a_response_end_the_connections_use() -> None:
    parser = ResponseParser()
    parser.feed(HEAD + b"Content-Length: 2\r\n\r\nokHTTP/1.1 200")
    assert parser.ended
    assert not parser.reusable


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n",
        HEAD + b"X: " + b"a" * (65 << 10) + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * (9 << 10),
    ],
)
def test_what_is_no_response_is_refused(response: bytes) -> None:
    with pytest.raises(BadResponse):
        ResponseParser().feed(response)


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser_otherwise(data: bytes) -> None:
    parser = ResponseParser()
    try:
        parser.feed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + data)
    except BadResponse:
        return
    assert parser.status == 200


# ---- events


def heard(reader: AnswerReader, stream: bytes) -> list[Said]:
    return [reader.take(event) for event in EventStreamParser().feed(stream)]


def chunk(delta: str, more: str = "") -> bytes:
    return b'data: {"choices":[{"index":0,"delta":%b}]%b}\n\n' % (delta.encode(), more.encode())


def test_openai_tokens_are_deltas_with_content_or_reasoning() -> None:
    reader = OpenAIReader()
    stream = (
        chunk('{"role":"assistant","content":""}')
        + chunk('{"content":"Hel"}')
        + chunk('{"reasoning_content":"hm"}')
        + chunk('{"reasoning":"hm"}')
        + chunk('{"content":"\\ud83d"}')  # half a pair: the other half is in the next delta
        + chunk("{}")
        + b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":9}}\n\n'
        + b": ping\n\n"
        + b"data: [DONE]\n\n"
    )
    assert heard(reader, stream) == [
        Said.NOTHING,
        Said.TOKEN,
        Said.REASONING,
        Said.REASONING,
        Said.TOKEN,
        Said.NOTHING,
        Said.NOTHING,
        Said.DONE,
    ]
    assert (reader.prompt_tokens, reader.completion_tokens) == (3, 9)


@pytest.mark.parametrize("data", ["{", "[]", "5", '{"choices":5}', '{"choices":[{"delta":{"content":5}}]}'])
def test_an_event_of_another_shape_is_malformed(data: str) -> None:
    assert heard(OpenAIReader(), f"data: {data}\n\n".encode()) == [Said.MALFORMED]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ('{"code":"rate_limit_exceeded","type":"x","message":"m"}', "rate_limit_exceeded"),
        ('{"code":null,"type":"server_error"}', "server_error"),
        ('{"code":503}', "503"),
        ('"overloaded"', "overloaded"),
        ('{"code":"Incorrect key sk-123 provided"}', "unreadable"),
    ],
)
def test_an_error_in_the_stream_is_told_by_its_code_alone(error: str, code: str) -> None:
    """Its prose may say anything, our key for one."""
    reader = OpenAIReader()
    assert heard(reader, f'data: {{"error":{error}}}\n\n'.encode()) == [Said.ERROR]
    assert reader.error_code == code


SID = b"abcdefghijklmnopqrstuvwx"


def sluice(*numbers: int, sid: bytes = SID) -> bytes:
    return b"".join(b'id: %b.%d\ndata: {"token":"t"}\n\n' % (sid, number) for number in numbers)


START = b'retry: 1000\nevent: start\nid: %b.0\ndata: {"id":"x","model":"m"}\n\n' % SID
USAGE = b'event: usage\nid: %b.3\ndata: {"tokens":2,"prompt_tokens":4,"completion_tokens":2}\n\n' % SID
END = USAGE + b"id: %b.4\ndata: [DONE]\n\n" % SID


def test_a_sluice_answer_is_read_as_the_contract_has_it() -> None:
    reader = SluiceReader()
    stream = START + sluice(1, 2) + b"event: ping\ndata: {}\n\n" + END
    assert heard(reader, stream) == [Said.NOTHING, Said.TOKEN, Said.TOKEN, Said.NOTHING, Said.NOTHING, Said.DONE]
    assert (reader.lost, reader.doubled, reader.completion_tokens) == (0, 0, 2)
    assert reader.last_event_id == SID + b".4"


def test_a_sluice_error_is_no_token() -> None:
    reader = SluiceReader()
    stream = START + b'id: %b.1\ndata: {"error":"upstream_timeout","message":"late","retryable":true}\n\n' % SID
    assert heard(reader, stream)[-1] is Said.ERROR
    assert reader.error_code == "upstream_timeout"


@pytest.mark.parametrize(
    ("stream", "tokens", "lost", "doubled"),
    [
        (START + sluice(1, 2, 3), 3, 0, 0),
        (START + sluice(1, 3), 2, 1, 0),
        (START + sluice(1, 2, 2, 3), 3, 0, 1),
        (START + sluice(1, 2) + sluice(1, 2, sid=b"z" * 24), 4, 0, 1),
        (sluice(2), 1, 2, 0),
        (START + sluice(1) + END, 1, 1, 0),
        (b'data: {"token":"t"}\n\n' * 3, 3, 0, 0),
    ],
    ids=["whole", "a gap", "one twice", "another answer", "a late start", "fewer than told", "no ids"],
)
def test_an_event_lost_or_doubled_is_seen(stream: bytes, tokens: int, lost: int, doubled: int) -> None:
    reader = SluiceReader()
    assert heard(reader, stream).count(Said.TOKEN) == tokens
    assert (reader.lost, reader.doubled) == (lost, doubled)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":"rate_limit_exceeded","message":"m"}', "rate_limit_exceeded"),
        (b'{"error":{"code":"model_not_found"}}', "model_not_found"),
        (b"<html>", ""),
        (b"", ""),
        (b"[]", ""),
    ],
)
def test_a_refusal_is_told_by_its_code(body: bytes, code: str) -> None:
    assert refusal_code(body) == code


# ---- where requests go


@pytest.mark.parametrize(
    ("url", "kind", "whole"),
    [
        ("http://host:4001", None, "http://host:4001/api/stream"),
        ("https://host/", None, "https://host/api/stream"),
        ("http://host/api/stream", None, "http://host/api/stream"),
        ("http://host/sluice", None, "http://host/sluice/api/stream"),
        ("https://host/v1", None, "https://host/v1/chat/completions"),
        ("https://host/v1/", None, "https://host/v1/chat/completions"),
        ("https://host/x/chat/completions", None, "https://host/x/chat/completions"),
        ("http://host:8000", "openai", "http://host:8000/v1/chat/completions"),
        ("http://host/v1", "sluice", "http://host/v1/api/stream"),
        ("http://[::1]:4001", None, "http://[::1]:4001/api/stream"),
    ],
)
def test_a_url_says_what_stands_there(url: str, kind: str | None, whole: str) -> None:
    target = read_target(url, kind)
    assert target.url == whole
    assert target.kind is (Kind.OPENAI if whole.endswith("/chat/completions") else Kind.SLUICE)


@pytest.mark.parametrize(
    "url", ["host:4001", "ftp://host", "http://", "http://host:port", "http://h/?q=1", "http://h/#a", "http://a..b/"]
)
def test_anything_else_is_no_url_to_ask(url: str) -> None:
    with pytest.raises(BadTarget):
        read_target(url, None)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(BadTarget, match="credentials") as told:
        read_target("http://user:secret@host", None)
    assert "secret" not in str(told.value)


def test_a_question_may_hold_any_character() -> None:
    request = read_target("http://host", None).request(Prompt("ä&\r\nX: 1 #?"))
    line, *headers = request.decode("ascii").split("\r\n")
    assert line == "GET /api/stream?q=%C3%A4%26%0D%0AX%3A%201%20%23%3F HTTP/1.1"
    assert "Accept: text/event-stream" in headers
    assert headers[-2:] == ["", ""]


# ---- prompts


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompts(file) == (Prompt("one"), Prompt("two"))


def test_a_jsonl_file_has_an_object_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": messages}) + "\n")
    one, two = read_prompts(file)
    assert one.as_messages() == [{"role": "user", "content": "one"}]
    assert two.as_messages() == messages


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "no UTF-8"),
        ("p.txt", b"a\0b", "line 1"),
        ("p.jsonl", b'{"prompt":"a"}\n{"text":"b"}', "line 2: expected an object"),
        ("p.jsonl", b"{", "line 1"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_a_bad_prompt_file_is_told_with_its_line(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPrompts, match=told):
        read_prompts(tmp_path / name)


# ---- the command line


def options(*arguments: str, **environment: str) -> Options:
    return read_options(arguments, environment)


def test_ten_streams_for_thirty_seconds_are_the_default() -> None:
    load = options("http://host").load
    assert (load.streams, load.rate, load.duration_s, load.grace_s, load.requests) == (10, None, 30, 10, None)


def test_a_search_has_defaults_of_its_own() -> None:
    given = options("http://host", "--find-capacity", "--slo", "itl_p99=100ms", "--max-streams", "64")
    assert (given.load.streams, given.load.duration_s, given.load.warmup_s, given.max_streams) == (8, 10, 1, 64)
    assert [objective.name for objective in given.objectives.run] == ["itl_p99", "error_rate"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Give a URL"),
        (["--self-test", "http://host"], "nothing but --json"),
        (["--self-test", "--streams", "5"], "nothing but --json"),
        (["nonsense"], "is no URL to ask"),
        (["http://host", "--streams", "0"], "no whole number from 1"),
        (["http://host", "--streams", "many"], "no whole number"),
        (["http://host", "--rate", "-1"], "is no rate"),
        (["http://host", "--rate", "nan"], "is no rate"),
        (["http://host", "--rate", "5", "--streams", "5"], "give one"),
        (["http://host", "--rate", "5", "--think", "1s"], "--think"),
        (["http://host", "--duration", "soon"], "'soon' is no duration"),
        (["http://host", "--duration", "0"], "more than 0"),
        (["http://host", "--duration", "48h"], "more than a day"),
        (["http://host", "--abort-rate", "200%"], "is no share"),
        (["http://host", "--abort-rate", "60%", "--reconnect-rate", "60%"], "more than 1 together"),
        (["http://host", "--slo", "speed=1"], "'speed' is no objective"),
        (["http://host", "--find-capacity"], "--slo itl_p99=100ms"),
        (["http://host", "--find-capacity", "--slo", "ttft=1s"], "--slo itl_p99=100ms"),
        (["http://host", "--find-capacity", "--slo", "itl_p99=1s", "--rate", "5"], "--rate"),
        (["http://host", "--fail-on-slo"], "--slo itl_p99=100ms"),
        (["http://host", "--step", "5"], "--find-capacity"),
        (["http://host", "--max-streams", "5"], "--rate and --find-capacity"),
        (["http://host", "--model", "m"], "a Sluice chooses"),
        (["http://host/v1"], "--model"),
        (["http://host/v1", "--model", "m", "--reconnect-rate", "5%"], "no ids"),
        (["http://host", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["http://host", "--json", "nowhere/a.json"], "no folder"),
        (["http://host", "--api-key-file", "nowhere"], "nowhere cannot be read"),
        (["http://host", "--api-key", "two words"], "one word"),
        (["http://host", "--api", "k"], "unrecognized"),
        (["http://host", "--target", "grpc"], "invalid choice"),
    ],
)
def test_each_mistake_is_one_line_that_names_it(arguments: list[str], told: str) -> None:
    with pytest.raises(BadOptions) as raised:
        options(*arguments)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_key_comes_from_a_file_or_the_environment_and_shows_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-secret\n")
    for read in (
        options("http://h", "--api-key", "sk-secret"),
        options("http://h", "--api-key=sk-secret"),
        options("http://h", "--api-key-file", str(file)),
        options("http://h", LOADTEST_API_KEY="sk-secret"),
    ):
        assert read.target is not None
        assert b"Authorization: Bearer sk-secret\r\n" in read.target.request(Prompt("q"))
        assert "sk-secret" not in repr(read)
    assert options("http://h", "--api-key", "sk-secret").command == "python -m ops.loadtest http://h --api-key '***'"


def test_the_tester_shares_nothing_with_the_server_but_the_parser_of_event_streams() -> None:
    """What it finds wrong must not be wrong in both."""
    imported = {
        name
        for path in (ROOT / "ops" / "loadtest").glob("*.py")
        for name in re.findall(r"^(?:from|import) (server[.\w]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert imported == {"server.wire.sse"}
