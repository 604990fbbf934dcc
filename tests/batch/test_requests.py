"""Requests in both forms, and the errors of invalid lines."""

import json
from typing import Any

import pytest

from phi3_jax.batch.requests import OPTIONS, BadRequestError, Request, parse_request, read_requests

HELLO = [{"role": "user", "content": "Hello"}]


def line(**values: Any) -> bytes:
    return json.dumps(values).encode()


def openai(url: str = "/v1/chat/completions", **body: Any) -> bytes:
    return line(custom_id="a", method="POST", url=url, body=body)


def test_parses_plain_lines() -> None:
    options = {name: number for number, name in enumerate(OPTIONS)}
    request = parse_request(line(id="a", prompt="Once", **options), 3)
    assert request == Request(3, "a", "Once", None, options)
    assert parse_request(line(id=7, messages=HELLO, seed=None), 1) == Request(1, 7, None, HELLO)


def test_parses_openai_lines() -> None:
    body = {
        "model": "phi-3",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
        ],
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "stop": ["\n"],
        "n": 1,
        "stream": False,
        "user": "me",
        "tools": None,
    }
    options = {"max_new_tokens": 5, "temperature": 0.5, "stop_strings": ["\n"]}
    url = "/v1/chat/completions"
    assert parse_request(openai(**body), 2) == Request(2, "a", None, HELLO, options, url, "phi-3")
    request = parse_request(openai("/v1/completions", prompt="Once", seed=1), 1)
    assert request == Request(1, "a", "Once", None, {"seed": 1}, "/v1/completions", None)


def test_passes_tools_and_their_calls_to_the_template() -> None:
    """An answer that calls tools has no content, or null; the chat template says what it needs."""
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    answers = [{"role": "assistant", "tool_calls": calls}]
    answers.append({"role": "assistant", "content": None, "tool_calls": calls})
    for answer in answers:
        messages = [*HELLO, answer, {"role": "tool", "tool_call_id": "1", "content": "12:00"}]
        request = parse_request(openai(messages=messages, tools=tools, tool_choice="auto"), 1)
        assert (request.messages, request.tools) == (messages, tools)
        request = parse_request(line(id=1, messages=messages, tools=tools), 1)
        assert (request.messages, request.tools) == (messages, tools)
    assert parse_request(openai(messages=HELLO, tools=[]), 1).tools is None


@pytest.mark.parametrize(
    ("bad", "code", "id", "words"),
    [
        (b'{"id": 1, "prompt": "a"', "invalid_json", None, "line 4 is not valid JSON: "),
        (b"[" * 100_000, "invalid_json", None, "line 4 is not valid JSON: "),
        (b'{"id": "\xff"}', "invalid_encoding", None, "not valid UTF-8: invalid start byte at byte 8"),
        (b'{"id": 1, "prompt": "\\ud800"}', "invalid_encoding", 1, "half of a surrogate pair"),
        (b"[1]", "invalid_request", None, "is a list; expected an object"),
        (line(prompt="a"), "missing_id", None, "id is missing"),
        (line(id=True, prompt="a"), "invalid_id", None, "id is true or false; expected a string or an int"),
        (line(id=1.5, prompt="a"), "invalid_id", None, "id is a number"),
        (line(id=1), "invalid_request", 1, "give either prompt or messages"),
        (line(id=1, prompt="a", messages=HELLO), "invalid_request", 1, "give either prompt or messages"),
        (line(id=1, prompt=""), "invalid_request", 1, "prompt is empty"),
        (line(id=1, prompt=[1, 2]), "invalid_request", 1, "prompt is a list; expected a string"),
        (
            line(id=1, prompt="a", temprature=1),
            "unknown_option",
            1,
            "no option 'temprature'; use max_new_tok",
        ),
        (line(id=1, messages=[]), "invalid_request", 1, "expected a list with at least one message"),
        (line(id=1, messages="Hello"), "invalid_request", 1, "messages is a string"),
        (line(id=1, messages=["Hello"]), "invalid_request", 1, "messages[0] is not an object with a role"),
        (line(id=1, messages=[{"role": "user"}]), "invalid_request", 1, "messages[0] has no content"),
        (
            line(id=1, messages=[{"role": "user", "content": []}]),
            "invalid_request",
            1,
            "messages[0] has no con",
        ),
        (line(custom_id="a", method="GET", url="", body={}), "invalid_method", "a", "method is 'GET'"),
        (line(custom_id="a", url="/v1/embeddings", body={}), "invalid_url", "a", "url is '/v1/embeddings'"),
        (line(custom_id="a", url="/v1/completions", body=3), "invalid_request", "a", "body is a number"),
        (line(custom_id=None, url="/v1/completions", body={}), "missing_id", None, "custom_id is missing"),
        (openai(messages=HELLO, n=2), "unsupported_option", "a", "n=2 is not supported"),
        (openai(messages=HELLO, n=True), "unsupported_option", "a", "n=True is not supported"),
        (openai(messages=HELLO, stream=True), "unsupported_option", "a", "stream=True is not supported"),
        (openai(messages=HELLO, tools=["f"]), "invalid_request", "a", "expected a list of objects"),
        (openai(messages=HELLO, tool_choice="required"), "unsupported_option", "a", "tool_choice='required'"),
        (line(id=1, prompt="a", tools=[{}]), "invalid_request", 1, "tools need messages"),
        (openai(messages=[{"role": "user", "content": None}]), "invalid_request", "a", "has no content"),
        (openai(messages=HELLO, tempature=1), "unknown_option", "a", "unknown option 'tempature'"),
        (openai(messages=HELLO, prompt="a"), "unknown_option", "a", "unknown option 'prompt'"),
        (
            openai(messages=HELLO, max_tokens=1, max_completion_tokens=2),
            "invalid_request",
            "a",
            "contradicts",
        ),
        (openai("/v1/completions", messages=HELLO), "unknown_option", "a", "unknown option 'messages'"),
        (openai("/v1/completions"), "invalid_request", "a", "prompt is null"),
        (
            openai(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "unsupported_content",
            "a",
            "something other than text",
        ),
    ],
)
def test_rejects_invalid_lines(bad: bytes, code: str, id: Any, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_request(bad, 4)
    error = caught.value
    assert (error.line, error.code, error.id) == (4, code, id)
    assert words in str(error)
    assert str(error).startswith("line 4")
    assert error.openai == (b"custom_id" in bad)


def test_continues_after_an_invalid_line() -> None:
    lines = [line(id=1, prompt="a"), b"\n", b"{", b"  \r\n", line(id=2, prompt="b")]
    results = list(read_requests(iter(lines)))
    assert [(each.line, type(each)) for each in results] == [(1, Request), (3, BadRequestError), (5, Request)]


def test_reads_one_line_at_a_time() -> None:
    def lines() -> Any:
        yield line(id=1, prompt="a")
        raise AssertionError

    assert next(read_requests(lines())).line == 1
