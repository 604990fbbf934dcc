"""Reads lines of requests, in our own form or that of OpenAI's Batch API; errors name what is wrong."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, cast

from phi3_jax.batch.options import RowOptions
from phi3_jax.errors import UserError
from phi3_jax.runs.text import lone_surrogate, parse_json

OPTIONS = ("max_new_tokens", "stop_strings", *RowOptions.__dataclass_fields__)
"""The options of a line; the names are those of GenerationConfig and, for `seed`, of `generate`."""

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

_OPENAI_OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop": "stop_strings",
    **{name: name for name in ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")},
}
_OPENAI_UNUSED = {"model", "user", "metadata", "store", "service_tier"}
_OPENAI_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
}
"""Unsupported options of the body, with the values that ask for nothing."""


class RequestFile(NamedTuple):
    """One of several input files."""

    name: str
    """Its path or URL."""
    number: int
    """Its number among the files, from 1."""


@dataclass(frozen=True)
class Request:
    """A prompt and the options of its answer."""

    line: int
    """The number of the line, from 1."""
    id: str | int
    prompt: str | None
    """A text that is continued as it is."""
    messages: list[dict[str, Any]] | None
    """A conversation for the chat template, in place of `prompt`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values of `OPTIONS`; none is None."""
    openai: str | None = None
    """The `url` of a line in OpenAI's form; the answer has the same form."""
    model: str | None = None
    """The model's name in OpenAI's form; the answer repeats it."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of tools for the chat template."""
    file: RequestFile | None = None
    """The file of the line; None: there is only one."""

    @property
    def place(self) -> str:
        """Its line and file in messages."""
        return _place(self.line, self.file)


class BadRequestError(UserError):
    """A line that cannot be answered.

    Attributes:
        line: the number of the line, from 1.
        id: the request's id; None: it is missing, invalid or that of an earlier line.
        code: the kind of error, for programs.
        openai: the line is in OpenAI's form, or looks like it.
        file: the file of the line; None: there is only one.
    """

    def __init__(
        self,
        line: int,
        code: str,
        message: str,
        *,
        id: str | int | None = None,
        openai: bool = False,
        file: RequestFile | None = None,
    ):
        super().__init__(message)
        self.line, self.code, self.id, self.openai, self.file = line, code, id, openai, file


def read_requests(
    lines: Iterable[bytes], file: RequestFile | None = None
) -> Iterator[Request | BadRequestError]:
    """Yields a request or an error for each line that is not blank; reads one line at a time."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse_request(line, number, file)
        except BadRequestError as error:
            yield error


def parse_request(line: bytes, number: int, file: RequestFile | None = None) -> Request:
    """Returns the request of a line.

    Raises:
        BadRequestError: the line is not valid JSON, or asks for something that is not supported.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{_place(number, file)} is not valid UTF-8: {error.reason} at byte {error.start}"
        raise BadRequestError(number, "invalid_encoding", message, file=file) from None
    try:
        values = parse_json(text, _place(number, file))
    except UserError as error:
        raise BadRequestError(number, "invalid_json", str(error), file=file) from None
    return parse_object(values, number, file)


def parse_object(values: Any, number: int, file: RequestFile | None = None) -> Request:
    """Returns the request of a line's JSON value.

    Raises:
        BadRequestError: the value asks for something that is not supported.
    """
    if not isinstance(values, dict):
        message = f"{_place(number, file)} is {_json_type(values)}; expected an object"
        raise BadRequestError(number, "invalid_request", message, file=file)
    parser = _LineParser(number, values, file)
    return parser.parse_openai() if "custom_id" in values else parser.parse_plain()


class _LineParser:
    """Parses and checks the JSON object of a line."""

    def __init__(self, number: int, values: dict[str, Any], file: RequestFile | None):
        self._number, self._values, self._file = number, values, file
        self._is_openai = "custom_id" in values
        id = values.get("custom_id" if self._is_openai else "id")
        self._id = id if _is_id(id) else None

    def parse_plain(self) -> Request:
        values = self._values
        id = self._require_id("id")
        if unknown := sorted(values.keys() - {"id", "prompt", "messages", "tools", *OPTIONS}):
            self._reject("unknown_option", f"there is no option {unknown[0]!r}; use {', '.join(OPTIONS)}")
        prompt, messages = values.get("prompt"), values.get("messages")
        if (prompt is None) == (messages is None):
            self._reject("invalid_request", "give either prompt or messages")
        if prompt is not None:
            self._check_prompt(prompt)
        else:
            self._check_messages(messages)
        options = {name: values[name] for name in OPTIONS if values.get(name) is not None}
        tools = self._tools(values, messages)
        return Request(self._number, id, prompt, messages, options, tools=tools, file=self._file)

    def parse_openai(self) -> Request:
        values = self._values
        id = self._require_id("custom_id")
        url, body = values.get("url"), values.get("body")
        if values.get("method", "POST") != "POST":
            self._reject("invalid_method", f"method is {values['method']!r}; expected 'POST'")
        if url not in (CHAT, COMPLETION):
            self._reject("invalid_url", f"url is {url!r}; expected {CHAT!r} or {COMPLETION!r}")
        if not isinstance(body, dict):
            self._reject("invalid_request", f"body is {_json_type(body)}; expected an object")
        options = self._openai_options(body, ("messages", "tools") if url == CHAT else ("prompt",))
        prompt, messages = (None, body.get("messages")) if url == CHAT else (body.get("prompt"), None)
        if url == CHAT:
            self._check_messages(messages)
            messages = [self._join_content(message) for message in messages or ()]
        else:
            self._check_prompt(prompt)
        model = body.get("model")
        return Request(
            self._number,
            id,
            prompt,
            messages,
            options,
            url,
            model if isinstance(model, str) else None,
            self._tools(body, messages) if url == CHAT else None,
            self._file,
        )

    def _openai_options(self, body: Mapping[str, Any], contents: tuple[str, ...]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, value in body.items():
            if value is None or name in contents or name in _OPENAI_UNUSED:
                continue
            if name in _OPENAI_OPTIONS:
                our_name = _OPENAI_OPTIONS[name]
                if (earlier := options.setdefault(our_name, value)) != value:
                    self._reject("invalid_request", f"{name}={value!r} contradicts {our_name}={earlier!r}")
            elif name not in _OPENAI_NEUTRAL:
                self._reject("unknown_option", f"body has an unknown option {name!r}")
            elif not any(value == other and type(value) is type(other) for other in _OPENAI_NEUTRAL[name]):
                self._reject("unsupported_option", f"{name}={value!r:.60} is not supported; leave it out")
        return options

    def _join_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message with the text of its content, which may be a list of text parts."""
        content = message.get("content")
        if content is None or isinstance(content, str):
            return message
        texts: list[str] = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                self._reject("unsupported_content", "a message's content holds something other than text")
            texts.append(text)
        return message | {"content": "".join(texts)}

    def _require_id(self, name: str) -> str | int:
        value = self._values.get(name)
        if value is None:
            self._reject("missing_id", f"{name} is missing, which identifies the answer")
        if not _is_id(value):
            self._reject("invalid_id", f"{name} is {_json_type(value)}; expected a string or an integer")
        return cast("str | int", value)

    def _check_prompt(self, prompt: Any) -> None:
        if not isinstance(prompt, str):
            self._reject("invalid_request", f"prompt is {_json_type(prompt)}; expected a string")
        if not prompt:
            self._reject("invalid_request", "prompt is empty")
        self._check_text(prompt)

    def _check_messages(self, messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            self._reject(
                "invalid_request",
                f"messages is {_json_type(messages)}; expected a list with at least one message",
            )
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                self._reject("invalid_request", f"messages[{number}] is not an object with a role")
            content = message.get("content")
            no_text = content is None and message.get("tool_calls")  # the template says what it needs
            if not (no_text or isinstance(content, str) or (self._is_openai and isinstance(content, list))):
                self._reject("invalid_request", f"messages[{number}] has no content that is a string")
            self._check_text(json.dumps(message, ensure_ascii=False))

    def _tools(self, values: Mapping[str, Any], messages: Any) -> list[dict[str, Any]] | None:
        """Returns the schemas of tools, or None."""
        tools = values.get("tools")
        if tools is None:
            return None
        if messages is None:
            self._reject("invalid_request", "tools need messages, whose chat template shows them")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            self._reject("invalid_request", f"tools is {_json_type(tools)}; expected a list of objects")
        self._check_text(json.dumps(tools, ensure_ascii=False))
        return tools or None

    def _check_text(self, text: str) -> None:
        if lone_surrogate(text) is not None:
            self._reject("invalid_encoding", "the text holds half of a surrogate pair")

    def _reject(self, code: str, message: str) -> NoReturn:
        place = _place(self._number, self._file)
        raise BadRequestError(
            self._number,
            code,
            f"{place}: {message}",
            id=self._id,
            openai=self._is_openai,
            file=self._file,
        )


def _place(line: int, file: RequestFile | None) -> str:
    return f"line {line}" if file is None else f"{file.name}, line {line}"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _json_type(value: Any) -> str:
    """Returns the JSON name of a value's type."""
    names = [
        (bool, "true or false"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for type_, name in names if isinstance(value, type_)), "null")
