"""Chat templates: which one a tokenizer has, what it gets, and its text."""

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from phi3_jax.errors import UserError

from ._tools import tool_schemas
from ._worker import RENDERER

_TURNS = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{ raise_exception("role '" ~ message['role'] ~ "' is not system, user or assistant") }}
{%- endif -%}
{{ '<|' ~ message['role'] ~ '|>NEWLINE' ~ message['content'] ~ '<|end|>NEWLINE' }}
{%- endfor -%}
{{ '<|assistant|>NEWLINE' if add_generation_prompt else eos_token }}"""

# For checkpoints without a template of their own.
PHI3_MINI_TEMPLATE = _TURNS.replace("NEWLINE", r"\n")
PHI3_SMALL_TEMPLATE = "{{ bos_token }}" + PHI3_MINI_TEMPLATE
PHI4_MINI_TEMPLATE = _TURNS.replace("NEWLINE", "")
PHI4_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message['role'] ~ '<|im_sep|>' ~ message['content'] ~ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"""

# A template that trims its messages keeps the mark, but without its trailing space.
_CONTINUE_HERE = "\ufdd0continue here\ufdd0 "

# The names of a message's reasoning; the first is the one that templates read most.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def default_template(token_to_id: Callable[[str], int | None], vocabulary: int) -> str | None:
    """Returns the family's template that fits the special tokens, or None.

    Only phi-4 has `<|im_start|>` and `<|im_sep|>`. The others share `<|user|>`, `<|assistant|>` and
    `<|end|>`. Of these phi-4-mini, which writes no newlines, has 200,000 tokens, the next largest 100,000.
    That is Phi-3-small, which begins with the bos token, the only other one with `<|endofprompt|>`.
    """

    def has(*tokens: str) -> bool:
        return all(token_to_id(token) is not None for token in tokens)

    if has("<|im_start|>", "<|im_sep|>", "<|im_end|>"):
        return PHI4_TEMPLATE
    if has("<|user|>", "<|assistant|>", "<|end|>"):
        if vocabulary > 150_000:
            return PHI4_MINI_TEMPLATE
        return PHI3_SMALL_TEMPLATE if has("<|endofprompt|>") else PHI3_MINI_TEMPLATE
    return None


def choose_template(chosen: str | None, own: str | Mapping[str, str] | None, tools: object) -> str:
    """Returns `chosen` (a template, or the name of one of several), else the tokenizer's own template."""
    if chosen is not None and not isinstance(chosen, str):
        raise UserError(f"chat_template must be a template or the name of one, got {chosen!r:.80}")
    if isinstance(own, str):
        return own if chosen is None else chosen
    named = own or {}
    if chosen is not None:
        return named.get(chosen, chosen)
    if not named:
        raise UserError("no chat template: the files have none and the special tokens are not the family's")
    name = "tool_use" if tools is not None and "tool_use" in named else "default"
    if name not in named:
        raise UserError(f"no chat template is called 'default'; pass chat_template= one of {sorted(named)}")
    return named[name]


class Rendered(NamedTuple):
    """The text of a conversation."""

    text: str
    spans: list[tuple[int, int]]
    """The start and the stop of each part that the template marks as generated."""


def check_variables(given: Mapping[str, Any], template: str, arguments: Collection[str]) -> None:
    """Refuses a variable that the template does not name, if it looks like a misspelt argument.

    Raises:
        TypeError: it does; the message has the argument.
    """
    for name in given:
        close = difflib.get_close_matches(name, arguments, n=1, cutoff=0.85)
        if close and not re.search(rf"\b{re.escape(name)}\b", template):
            raise TypeError(
                f"apply_chat_template has no argument {name!r}, and the chat template no such variable; did "
                f"you mean {close[0]!r}?"
            )


def check_generation_mask(template: str, with_ids: bool, continued: bool | str) -> None:
    """Checks that a mask of the assistant's tokens can be made.

    Raises:
        UserError: it cannot.
    """
    if not with_ids:
        raise UserError("return_assistant_tokens_mask=True needs return_dict=True and tokenize=True")
    if continued:
        raise UserError("return_assistant_tokens_mask and continue_final_message exclude each other")
    if not re.search(r"{%-?\s*generation\s*-?%}", template):
        raise UserError(
            "return_assistant_tokens_mask=True needs a chat template that marks what the assistant says with "
            "{% generation %} and {% endgeneration %}, and this one does not; pass one as chat_template"
        )


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations."""
    return (
        isinstance(conversation, list | tuple)
        and bool(conversation)
        and isinstance(conversation[0], list | tuple)
    )


def render(
    template: str,
    conversation: Any,
    *,
    tools: Any = None,
    documents: Any = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any],
) -> Rendered:
    """Renders the text of a conversation.

    Raises:
        UserError: the messages are not a conversation, or the template failed (with its own message) or
            exceeded a limit.
    """
    _check_messages(conversation)
    if continue_final_message and add_generation_prompt:
        raise UserError("continue_final_message and add_generation_prompt exclude each other")
    # The template gets plain data only: a sandbox cannot know which methods of objects are harmless.
    chat = [_with_reasoning(message) for message in _as_plain_data(list(map(dict, conversation)), "messages")]
    if continue_final_message:
        _mark_end(chat[-1], continue_final_message)
    values = {
        **{name: _as_plain_data(value, name) for name, value in variables.items()},
        "tools": _as_plain_data(tool_schemas(tools), "tools"),
        "documents": _as_plain_data(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text, spans = RENDERER.render(template, chat, values)
    if not continue_final_message:
        return Rendered(text, spans)
    cut = text.rfind(_CONTINUE_HERE.rstrip())
    if cut < 0:
        raise UserError("continue_final_message: the chat template leaves out the final message")
    kept = text[:cut] if text.startswith(_CONTINUE_HERE, cut) else text[:cut].rstrip()
    return Rendered(kept, spans)


def _check_messages(messages: object) -> None:
    """Checks that these are messages with roles; whether they need a content is for the template to say."""
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise UserError("messages is empty; expected at least one dict with 'role' and 'content'")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{index}] must be a dict, got {type(message).__name__} {message!r:.40}")
        missing = [] if "role" in message else ["role"]
        # An answer may consist of tool calls alone. But a message with nothing to say is a mistake.
        close = difflib.get_close_matches("content", map(str, message), n=1, cutoff=0.8)
        if "content" not in message and (close or message.keys() <= {"role", "name"}):
            missing.append("content")
        if missing:
            raise UserError(
                f"messages[{index}] has no {' and no '.join(missing)}; its keys are {list(message)}"
            )
        if not isinstance(message["role"], str):
            raise UserError(f"messages[{index}]['role'] must be a str, got {message['role']!r:.40}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message without keys that are None, and with its reasoning under all names for it.

    Other programs write None for what is absent, which templates would print. Templates differ in the name
    that they read the reasoning from. transformers does the same.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any], field: bool | str) -> None:
    """Puts a mark at the end of the message's field; True is its content."""
    field = "content" if field is True else str(field)
    text = message.get(field)
    parts = (
        [part for part in text if isinstance(part, dict) and "text" in part] if isinstance(text, list) else []
    )
    if parts:  # the last text among the parts of the content
        parts[-1]["text"] += _CONTINUE_HERE
    elif isinstance(text, str):
        names = _REASONING if field in _REASONING else (field,)
        for name in names:
            if message.get(name) == text:
                message[name] = text + _CONTINUE_HERE
    else:
        raise UserError(
            f"continue_final_message needs a final message with a text under {field!r}, got {text!r:.80}"
        )


def _as_plain_data(value: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat template: {name} must consist of JSON values: {error}") from error
