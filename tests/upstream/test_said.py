"""What an endpoint says of a failure: its shapes, its bounds, and that nothing of ours shows in it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from server.errors import Said
from server.upstream.endpoint import Endpoint
from server.upstream.said import hear, overhear, read_request_id, said_in_stream
from tests.upstream_sim import Call, Script, ScriptedUpstream

KEY = "sk-our-own-key-0451"
ENDPOINT = Endpoint("https://llm.corp.example/v1", "m", KEY)
PLAIN = {"type": None, "param": None, "code": None}


class Head:
    """All that is looked at of a response whose body is known."""

    def __init__(self, status: int = 400, **headers: str) -> None:
        self.status = status
        self.headers = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})

    @property
    def response(self) -> aiohttp.ClientResponse:
        return cast("aiohttp.ClientResponse", self)


def error_in_stream(error: Any, endpoint: Endpoint = ENDPOINT) -> Mapping[str, Any] | None:
    return said_in_stream(error, Head(200).response, endpoint).error


def redacted(text: str, endpoint: Endpoint = ENDPOINT) -> str:
    """The text as it is passed on."""
    error = error_in_stream({"message": text}, endpoint)
    assert error is not None
    return str(error["message"])


Hear = Callable[..., Awaitable[Said]]


@pytest.fixture
def heard(upstream: ScriptedUpstream) -> Hear:
    """``await heard(script)``: what a real response says."""

    async def ask(script: Script, *, endpoint: Endpoint = ENDPOINT) -> Said:
        upstream.script = script
        async with aiohttp.ClientSession() as session, session.post(upstream.base_url, data=b"{}") as response:
            return await hear(response, endpoint)

    return ask


def body(data: bytes, status: int = 400, content_type: str = "application/json", **headers: str) -> Script:
    """A whole response with that body."""

    async def script(call: Call) -> None:
        await call.head(status, content_type, Content_Length=str(len(data)), **headers)
        call.ended = True
        await call.send(data)

    return script


# ---- Our key, and our account

HIDDEN = {
    "key": (f"Incorrect API key provided: {KEY}. Try another.", "0451"),
    "key in quotes": (f'"{KEY}"', "0451"),
    "key amid letters": (f"x{KEY}x", "0451"),
    "key twice": (f"{KEY} {KEY}", "0451"),
    "masked": ("Incorrect API key provided: sk-ab***yz.", "yz"),
    "masked in the middle": ("sk-proj-********************wxYZ is wrong", "wxYZ"),
    "masked by dots": ("The key sk-abcd...wxyz is wrong", "wxyz"),
    "Groq's": ("Invalid API Key gsk_Abc123***", "Abc"),
    "xAI's": ("Incorrect API key provided: xa***56. Or: xai-Abc***56", "Abc"),
    "another key": ("pk-Abc123 rk-Abc123", "Abc123"),
    "bearer": ("Authorization: Bearer eyJhbGci.eyJzdWIi.c2ln", "eyJ"),
    "organisation": ("Rate limit reached for gpt-4o in organization org-AbCdEfGhIjKlMnOp on tokens per min", "AbCd"),
    "organisation in small letters": ("organization org-abcdefghijkl on requests", "abcdef"),
    "project": ("Project `proj_AbC123dEf456` does not have access to model `gpt-5`", "AbC123"),
    "user": ("user-AbCdEf123456 is blocked", "AbCd"),
    "team": ("team_01HXYZABCDEF has no credit", "01HX"),
    "account": ("acct_1234567890 has no credit", "1234"),
}


@pytest.mark.parametrize(("text", "secret"), HIDDEN.values(), ids=HIDDEN.keys())
def test_no_key_and_no_account_of_ours_shows(text: str, secret: str) -> None:
    """Section 5: no key, account or URL of ours shows; OpenAI quotes a wrong key with stars in its middle."""
    assert secret not in redacted(text)
    assert "…" in redacted(text)


def test_the_words_round_it_stay() -> None:
    """Who reads the error is to understand it."""
    said = redacted("Rate limit reached for gpt-4o in organization org-AbCdEfGh on tokens per min (TPM): Limit 30000")
    assert said == "Rate limit reached for gpt-4o in organization … on tokens per min (TPM): Limit 30000"


@pytest.mark.parametrize("key", ["0123456789abcdef", "a+b/c==", "plain", "né", ".*", "sk-", "\\d"])
def test_a_key_of_any_form_is_hidden_where_it_stands_in_full(key: str) -> None:
    """Other endpoints' keys look like anything; none of it is taken for a pattern."""
    assert redacted(f"bad: {key}!", Endpoint("https://llm.corp.example/v1", "m", key)) == "bad: …!"


def test_an_endpoint_without_a_key_has_none_to_hide() -> None:
    assert redacted("all is well", Endpoint("https://llm.corp.example/v1", "m")) == "all is well"


@pytest.mark.parametrize(
    "error",
    [
        {"message": "m", "type": KEY},
        {"message": "m", "param": f"x.{KEY}"},
        {"message": "m", "code": KEY},
        {"message": "m", KEY: 1},
        {"message": "m", "inner": {"deep": [{"deeper": ["a", KEY]}]}},
        {"message": "m", "inner": {KEY: {KEY: KEY}}},
    ],
)
def test_it_is_hidden_wherever_in_the_error_object_it_stands(error: Any) -> None:
    said = error_in_stream(error)
    assert said is not None
    assert said["message"] == "m"
    assert KEY not in json.dumps(said)


KEPT = [
    "You can find your API key at https://platform.openai.com/account/api-keys.",
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
    "Unsupported parameter: 'web_search_options.user_location'",
    "'metadata' must be key-value pairs",
    "user-defined team_members, the organization's project, org-chart",
    "a risk-free task-1234 of the desk-top",
    "Invalid image_url: https://pictures.example/sk/cat.png?size=1",
    "https://docs.llm.corp.example/ and https://llm.corp.example.com/ and http://myllm.corp.example/ are others",
    "mail llm.corp.examples",
    "日本語 🎈 \u2028 \x00",
    "",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_tells_nothing_of_us_is_passed_on_as_it_is(text: str) -> None:
    """Section 5: the error object passes through; a page that explains it is of use."""
    assert redacted(text) == text


# ---- Where the endpoint is

PLACES = {
    "https": ("https://llm.corp.example/v1", "llm.corp.example"),
    "port": ("http://llm.corp.example:8000/v1", "llm.corp.example"),
    "address": ("http://10.1.2.3:8000/v1", "10.1.2.3"),
    "address without a port": ("http://10.1.2.3/v1", "10.1.2.3"),
    "IPv6": ("http://[fd00::12]:8000/v1", "fd00::12"),
    "IPv6 without a port": ("http://[fd00::12]/v1", "fd00::12"),
    "one word": ("http://inference:8000/v1", "inference"),
    "a port that goes without saying": ("https://llm.corp.example:443/v1", "llm.corp.example"),
    "capitals": ("https://LLM.Corp.Example/v1", "llm.corp.example"),
    "user and password": ("https://relay:pa55@llm.corp.example/v1", "llm.corp.example"),
    "slash behind": ("https://llm.corp.example/v1/", "llm.corp.example"),
}


@pytest.mark.parametrize(("base_url", "host"), PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize(
    "text",
    [
        "POST {} failed",
        "{}",
        "POST {}/chat/completions failed",
        "no route to {}.",
        "see <{}>",
        "('{}', 'refused')",
        "HTTPConnection({}/chat/completions?api-version=1): refused",
    ],
)
def test_our_endpoints_url_does_not_show(text: str, base_url: str, host: str) -> None:
    """Section 5: no URL of ours. The words round it stay, up to the next space or quotation mark."""
    said = redacted(text.format(base_url), Endpoint(base_url, "m"))
    assert "…" in said
    assert host not in said.lower()
    assert "/v1" not in said
    assert "pa55" not in said
    assert said.startswith(text.partition("{}")[0])


@pytest.mark.parametrize("form", [str.upper, str.title, lambda url: url.replace("://", "://user:pass@")])
def test_our_endpoints_url_does_not_show_in_another_spelling(form: Callable[[str], str]) -> None:
    said = redacted(f"at {form('https://llm.corp.example/v1')} it failed")
    assert said == "at … it failed"


@pytest.mark.parametrize(("base_url", "host"), PLACES.values(), ids=PLACES.keys())
def test_host_and_port_do_not_show_without_a_scheme_either(base_url: str, host: str) -> None:
    """As Python's own errors name a peer."""
    shown = f"[{host}]" if ":" in host else host
    port = 8000 if ":8000" in base_url else 443 if base_url.startswith("https") else 80
    assert redacted(f"cannot connect to {shown}:{port} [refused]", Endpoint(base_url, "m")) == (
        "cannot connect to … [refused]"
    )


@pytest.mark.parametrize("host", ["llm.corp.example", "10.1.2.3"])
def test_a_full_name_or_address_does_not_show_alone(host: str) -> None:
    assert redacted(f"{host}: name or service not known", Endpoint(f"http://{host}:8000/v1", "m")) == (
        "…: name or service not known"
    )


@pytest.mark.parametrize(
    "base_url", ["http://h:80/v1", "http://model:80/v1", "http://model:8000/v1", "http://model/v1"]
)
def test_a_host_that_is_a_word_leaves_the_word_alone(base_url: str) -> None:
    """In a network of containers a host may be called ``model``."""
    text = "The model has no such host; the models are model-1 and remodel:8000x"
    assert redacted(text, Endpoint(base_url, "m")) == text


# ---- Shapes

SHAPES = {
    "OpenAI": (
        {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}},
        {"message": "m", "type": "t", "param": "p", "code": "c"},
    ),
    "what lacks is null": ({"error": {"message": "m"}}, {"message": "m", **PLAIN}),
    "what is more stays": (
        {"error": {"message": "m", "code": 429, "innererror": {"code": "x", "n": [1, 2.5, True, None]}}},
        {"message": "m", **PLAIN, "code": 429, "innererror": {"code": "x", "n": [1, 2.5, True, None]}},
    ),
    "a text": ({"error": "model 'x' not found"}, {"message": "model 'x' not found", **PLAIN}),
    "bare": (
        {"object": "error", "message": "m", "type": "BadRequestError", "param": None, "code": 400},
        {"message": "m", "type": "BadRequestError", "param": None, "code": 400},
    ),
    "bare beside a number": ({"error": 400, "message": "m"}, {"message": "m", **PLAIN}),
    "an empty message": ({"error": {"message": ""}}, {"message": "", **PLAIN}),
}


@pytest.mark.parametrize(("value", "error"), SHAPES.values(), ids=SHAPES.keys())
async def test_an_error_object_of_any_shape_becomes_openais(heard: Hear, value: Any, error: Any) -> None:
    """Section 5: the upstream's error object passes through; SDKs read its four fields."""
    assert (await heard(body(json.dumps(value).encode()))).error == error


NONE: list[Any] = [
    None, [], {}, "x", 7, True, {"error": None}, {"error": ""}, {"error": 7}, {"error": []}, {"error": {}},
    {"error": {"code": 7}}, {"error": {"message": None}}, {"error": {"message": ["m"]}}, {"message": 7},
    {"detail": "m"}, [{"error": {"message": "m"}}],
]  # fmt: skip


@pytest.mark.parametrize("value", NONE, ids=json.dumps)
async def test_what_is_no_error_object_says_nothing(heard: Hear, value: Any) -> None:
    """It is told in our words then; the status stays."""
    said = await heard(body(json.dumps(value).encode(), 418))
    assert (said.status, said.error, said.context_exceeded) == (418, None, False)


@pytest.mark.parametrize(
    ("error", "exceeded"),
    [
        ({"message": "m", "code": "context_length_exceeded"}, True),
        ({"message": "m", "type": "context_length_exceeded"}, True),
        ({"message": "m", "code": "invalid_api_key"}, False),
        ({"message": "context_length_exceeded"}, False),
        ({"message": "m", "code": ["context_length_exceeded"]}, False),
        ({"message": "m", "code": {"context_length_exceeded": 1}}, False),
        ({"code": "context_length_exceeded"}, False),
    ],
)
def test_a_conversation_too_long_is_known_by_its_code(error: Any, exceeded: bool) -> None:
    """SLUICE_RETRIES: context_length_exceeded goes to the next upstream."""
    assert said_in_stream(error, Head(200).response, ENDPOINT).context_exceeded is exceeded


# ---- Odd bodies

OTHER_TYPES = ["text/html", "text/plain", "application/octet-stream", "", "application/jsonp", "json"]


@pytest.mark.parametrize("content_type", OTHER_TYPES)
async def test_a_body_of_another_type_is_not_read(heard: Hear, content_type: str) -> None:
    """A proxy's page, perhaps; nothing of it is passed on."""
    assert (await heard(body(b'{"error":{"message":"m"}}', content_type=content_type))).error is None


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/problem+json"]
)
async def test_json_has_several_names(heard: Hear, content_type: str) -> None:
    assert (await heard(body(b'{"error":{"message":"m"}}', content_type=content_type))).error == {
        "message": "m",
        **PLAIN,
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error":{"message":"a\xffb"}}', "a\ufffdb"),
        (b'{"error":{"message":"\\ud83d"}}', "\ud83d"),
        (b'{"error":{"message":"m","x":NaN}}', "m"),
        (b'{"error":{"message":"m","x":1e400}}', "m"),
        (b'{"error":{"message":"m","x":' + b"9" * 1000 + b"}}", "m"),
        (b' \n{"error":{"message":"m"}}\n', "m"),
    ],
)
async def test_a_body_that_is_slightly_wrong_is_read_all_the_same(heard: Hear, data: bytes, message: str) -> None:
    error = (await heard(body(data))).error
    assert error is not None
    assert error["message"] == message


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"not JSON", b'{"error":{"message":"m"}', b'{"error":{"message":"m"}}x', b"\xff\xfe",
        b"[" * 60_000, b'{"error":' * 7000, b'{"error":{"message":"m","x":' + b"[" * 60_000,
    ],
)  # fmt: skip
async def test_a_body_that_is_no_json_says_nothing(heard: Hear, data: bytes) -> None:
    assert (await heard(body(data, 500))).error is None


@pytest.mark.parametrize(("size", "read"), [(60_000, True), (64 << 10, False), (1 << 20, False)])
async def test_a_large_body_is_not_an_error_object(heard: Hear, size: int, read: bool) -> None:
    """What is read of it is bounded."""
    error = (await heard(body(json.dumps({"error": "x" * size}).encode()))).error
    assert (error is not None) is read


async def test_a_body_without_end_is_given_up(heard: Hear) -> None:
    async def flood(call: Call) -> None:
        await call.head(500, "application/json")
        while call.open:
            await call.write(b" " * 16_384)

    async with asyncio.timeout(5):
        assert (await heard(flood)).error is None


async def test_a_body_that_does_not_come_is_not_waited_for(heard: Hear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for the answer, and the next endpoint could be asked meanwhile."""
    monkeypatch.setattr("server.upstream.said._BODY_TIMEOUT", 0.02)

    async def dawdle(call: Call) -> None:
        await call.head(503, "application/json", Retry_After="3")
        await call.write(b'{"error":')
        await call.gone()

    async with asyncio.timeout(5):
        said = await heard(dawdle)
    assert (said.status, said.error, said.headers) == (503, None, {"Retry-After": "3"})


@pytest.mark.parametrize("how", [Call.close, Call.reset])
async def test_a_body_that_breaks_off_says_nothing(heard: Hear, how: Callable[[Call], None]) -> None:
    async def break_off(call: Call) -> None:
        await call.head(500, "application/json")
        await call.write(b'{"error":{"message":"m"}}')
        how(call)

    said = await heard(break_off)
    assert (said.status, said.error) == (500, None)


@pytest.mark.parametrize("levels", [1, 6, 7, 8, 50, 900])
def test_a_deep_error_object_is_cut(levels: int) -> None:
    """Deeper than eight, it is no error object that anybody reads."""
    value: Any = "deep"
    for _ in range(levels):
        value = {"x": value}
    said = error_in_stream({"message": "m", "x": value})
    assert said is not None
    assert said["message"] == "m"
    assert ("deep" in json.dumps(said)) is (levels <= 7)


COSTLY = {
    "many fields": {str(number): "x" for number in range(90_000)},
    "many items": {"x": ["y"] * 90_000},
    "a long text": {"x": "y" * (1 << 20)},
    "nearly a URL": {"x": "https://llm.corp.exampl " * 40_000},
    "nearly a URL, at once": {"x": "https://" * 130_000},
    "userinfo": {"x": "https://" + "a@" * 500_000},
    "nearly keys": {"x": "key-" * 250_000},
    "nearly accounts": {"x": "user-" * 200_000},
    "nearly bearer": {"x": "Bearer " + " " * 1_000_000},
    "dots": {"x": "llm." * 250_000},
}


@pytest.mark.parametrize("fields", COSTLY.values(), ids=COSTLY.keys())
def test_an_error_is_made_fit_quickly_whatever_it_holds(fields: Any) -> None:
    """An event may hold a megabyte, and everybody else's tokens wait meanwhile. 50 ms, with room for a slow machine."""
    took = []
    for _ in range(3):
        began_at = time.thread_time()
        assert error_in_stream({"message": "m"} | fields) is not None
        took.append(time.thread_time() - began_at)
    assert min(took) < 0.25


# ---- Headers


def test_headers_that_say_what_to_do_next_are_passed_on() -> None:
    """Section 5: Retry-After; and what OpenAI's SDKs obey beside it."""
    head = Head(429, retry_after="7", retry_after_ms="6500", x_should_retry="true")
    assert overhear(head.response, ENDPOINT).headers == {
        "Retry-After": "7",
        "Retry-After-Ms": "6500",
        "X-Should-Retry": "true",
    }


@pytest.mark.parametrize(
    "name",
    ["Set-Cookie", "OpenAI-Organization", "OpenAI-Project", "OpenAI-Processing-Ms", "Server", "Via", "Location",
     "X-RateLimit-Limit-Requests", "Content-Encoding", "Connection", "Transfer-Encoding", "WWW-Authenticate"],
)  # fmt: skip
def test_other_headers_are_not(name: str) -> None:
    """They are about the connection to the endpoint, or about our account there."""
    assert overhear(Head(429, **{name: "x"}).response, ENDPOINT).headers == {}


@pytest.mark.parametrize("value", ["", "a\tb", "7\r\nX: y", "7\0", "sieben µ", "\udcff", "1" * 129])
def test_a_header_value_that_might_do_harm_is_dropped(value: str) -> None:
    said = overhear(Head(429, retry_after=value, x_request_id=value).response, ENDPOINT)
    assert said.headers == {}
    assert said.request_id is None


@pytest.mark.parametrize("request_id", ["req_123", "0af7651916cd43dd8448eb211c80319c", "a.b:c-d_e", "x" * 128])
def test_the_requests_id_is_passed_on(request_id: str) -> None:
    """Section 5: x-request-id; the endpoint's support asks for it."""
    assert read_request_id(Head(x_request_id=request_id).headers) == request_id
    assert overhear(Head(500, x_request_id=request_id).response, ENDPOINT).request_id == request_id


@pytest.mark.parametrize("request_id", ["a b", "a/b", "a\n", "<b>", "é", "x" * 129, "٣", KEY + "!"])
def test_what_is_no_id_is_not_passed_on(request_id: str) -> None:
    """It would stand in a header of ours, and in the log."""
    assert read_request_id(Head(x_request_id=request_id).headers) is None


def test_without_a_body_the_head_is_all_that_is_said() -> None:
    said = overhear(Head(503, content_type="application/json", retry_after="1").response, ENDPOINT)
    assert said == Said(status=503, headers={"Retry-After": "1"})


# ---- Anything at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([KEY, "message", "error"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["error", "message", "code", "type", KEY]), inner)
    ),
    max_leaves=15,
)


@given(VALUES)
def test_any_value_is_made_fit_or_dropped(error: Any) -> None:
    """Never another exception, and never our key."""
    said = error_in_stream(error)
    assert said is None or (isinstance(said["message"], str) and {"type", "param", "code"} <= set(said))
    assert KEY not in json.dumps(said)


PIECES = st.text(max_size=3) | st.sampled_from(
    ["*", "…", "https://", ":443", "/v1", "@", "Bearer ", "org-", "sk-", KEY]
)


@given(st.lists(PIECES, max_size=12))
def test_the_key_does_not_show_whatever_stands_round_it(pieces: list[str]) -> None:
    assert KEY not in redacted("".join(pieces))


@given(st.lists(PIECES, max_size=5), st.lists(PIECES, max_size=5))
def test_the_url_does_not_show_whatever_stands_round_it(before: list[str], behind: list[str]) -> None:
    assert "https://llm.corp.example/" not in redacted(
        f"{''.join(before)}https://llm.corp.example/v1 {''.join(behind)}"
    )
