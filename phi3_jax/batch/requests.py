"""Lines of requests: our own form and that of OpenAI's Batch API; faults name what is wrong with the line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from phi3_jax.errors import UserError

OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "stop_strings",
    "seed",
)
"""What a line may say about its own generation; names of GenerationConfig, and `seed` of `generate`."""

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
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
"""What the body may hold as long as it asks for nothing that we do not do."""


@dataclass(frozen=True)
class Request:
    """One prompt and what is said about its answer."""

    line: int
    """Counts from 1."""
    id: str | int
    prompt: str | None
    """Text to be continued as it is."""
    messages: list[dict[str, Any]] | None
    """Or a conversation, for the chat template."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `OPTIONS`, None left out."""
    openai: str | None = None
    """The `url` of a line in OpenAI's form, which is answered in that form."""
    model: str | None = None
    """The name that a line in OpenAI's form gave the model; its answer repeats it."""


class BadRequestError(UserError):
    """A line that cannot be answered.

    Attributes:
        line: counts from 1.
        id: the request's, None where there is none or it is another's.
        code: of the fault, for programs.
        openai: the line is in OpenAI's form, or looks like it.
    """

    def __init__(
        self, line: int, code: str, message: str, *, id: str | int | None = None, openai: bool = False
    ):
        super().__init__(message)
        self.line, self.code, self.id, self.openai = line, code, id, openai


def read_requests(lines: Iterable[bytes]) -> Iterator[Request | BadRequestError]:
    """A request or a fault for each line that is not blank, in order, one at a time."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse_request(line, number)
        except BadRequestError as error:
            yield error


def parse_request(line: bytes, number: int) -> Request:
    """The request of a line.

    Raises:
        BadRequestError: it is broken, or asks for what there is not.
    """
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"line {number} is not UTF-8: {error.reason} at byte {error.start}"
        raise BadRequestError(number, "invalid_encoding", message) from None
    except (ValueError, RecursionError) as error:
        message = f"line {number} is not JSON: {error}"
        raise BadRequestError(number, "invalid_json", message) from None
    return request_of(values, number)


def request_of(values: Any, number: int) -> Request:
    """The request of a line's object.

    Raises:
        BadRequestError: it asks for what there is not.
    """
    if not isinstance(values, dict):
        message = f"line {number} is {_kind(values)}; expected an object"
        raise BadRequestError(number, "invalid_request", message)
    return _Line(number, values).openai() if "custom_id" in values else _Line(number, values).plain()


class _Line:
    """A line's object, and the fault that it is refused with."""

    def __init__(self, number: int, values: dict[str, Any]):
        self._number, self._values = number, values
        self._is_openai = "custom_id" in values
        found = values.get("custom_id" if self._is_openai else "id")
        self._id = found if _is_id(found) else None

    def plain(self) -> Request:
        values = self._values
        id = self._identity("id")
        if unknown := sorted(values.keys() - {"id", "prompt", "messages", *OPTIONS}):
            self._refuse("unknown_option", f"there is no option {unknown[0]!r}; use {', '.join(OPTIONS)}")
        prompt, messages = values.get("prompt"), values.get("messages")
        if (prompt is None) == (messages is None):
            self._refuse("invalid_request", "give either prompt or messages")
        if prompt is not None:
            self._check_prompt(prompt)
        else:
            self._check_messages(messages)
        options = {name: values[name] for name in OPTIONS if values.get(name) is not None}
        return Request(self._number, id, prompt, messages, options)

    def openai(self) -> Request:
        values = self._values
        id = self._identity("custom_id")
        url, body = values.get("url"), values.get("body")
        if values.get("method", "POST") != "POST":
            self._refuse("invalid_method", f"method is {values['method']!r}; expected 'POST'")
        if url not in (CHAT, COMPLETION):
            self._refuse("invalid_url", f"url is {url!r}; expected {CHAT!r} or {COMPLETION!r}")
        if not isinstance(body, dict):
            self._refuse("invalid_request", f"body is {_kind(body)}; expected an object")
        options = self._openai_options(body, "messages" if url == CHAT else "prompt")
        prompt, messages = (None, body.get("messages")) if url == CHAT else (body.get("prompt"), None)
        if url == CHAT:
            self._check_messages(messages)
            messages = [self._with_text(message) for message in messages or ()]
        else:
            self._check_prompt(prompt)
        model = body.get("model")
        return Request(
            self._number, id, prompt, messages, options, url, model if isinstance(model, str) else None
        )

    def _openai_options(self, body: Mapping[str, Any], content: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, value in body.items():
            if value is None or name == content or name in _OPENAI_UNUSED:
                continue
            if name in _OPENAI_OPTIONS:
                own = _OPENAI_OPTIONS[name]
                if options.get(own, value) != value:
                    self._refuse("invalid_request", f"{name}={value!r} contradicts {own}={options[own]!r}")
                options[own] = value
            elif name not in _OPENAI_NEUTRAL:
                self._refuse("unknown_option", f"body has {name!r}, which is not known here")
            elif not any(value == other and type(value) is type(other) for other in _OPENAI_NEUTRAL[name]):
                self._refuse("unsupported_option", f"{name}={value!r:.60} is not supported; leave it out")
        return options

    def _with_text(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content may be a list of parts, which must all be text."""
        content = message["content"]
        if isinstance(content, str):
            return message
        texts: list[str] = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                self._refuse("unsupported_content", "a message's content holds something else than text")
            texts.append(text)
        return message | {"content": "".join(texts)}

    def _identity(self, name: str) -> str | int:
        value = self._values.get(name)
        if value is None:
            self._refuse("missing_id", f"{name} is missing, by which the answer would be known")
        if not _is_id(value):
            self._refuse("invalid_id", f"{name} is {_kind(value)}; expected a string or an integer")
        return cast("str | int", value)

    def _check_prompt(self, prompt: Any) -> None:
        if not isinstance(prompt, str):
            self._refuse("invalid_request", f"prompt is {_kind(prompt)}; expected a string")
        if not prompt:
            self._refuse("invalid_request", "prompt is empty")
        self._check_text(prompt)

    def _check_messages(self, messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            self._refuse(
                "invalid_request", f"messages is {_kind(messages)}; expected a list with at least one message"
            )
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                self._refuse("invalid_request", f"messages[{number}] is no object with a role")
            content = message.get("content")
            if not (isinstance(content, str) or (self._is_openai and isinstance(content, list))):
                self._refuse("invalid_request", f"messages[{number}] has no content that is a string")
            self._check_text(json.dumps(message, ensure_ascii=False))

    def _check_text(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse("invalid_encoding", "the text has half of a surrogate pair in it, no character")

    def _refuse(self, code: str, message: str) -> NoReturn:
        raise BadRequestError(
            self._number, code, f"line {self._number}: {message}", id=self._id, openai=self._is_openai
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _kind(value: Any) -> str:
    """What JSON calls the value."""
    kinds = [
        (bool, "true or false"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")
