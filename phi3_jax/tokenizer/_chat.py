"""Chat templates: Jinja in a sandbox, with the names and filters that Hugging Face's templates use."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_jax.errors import UserError

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
PHI4_MINI_TEMPLATE = _TURNS.replace("NEWLINE", "")
PHI4_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message['role'] ~ '<|im_sep|>' ~ message['content'] ~ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"""

# A template that trims its messages keeps the mark, but without its trailing space.
_CONTINUE_HERE = "\ufdd0continue here\ufdd0 "


def default_template(token_to_id: Callable[[str], int | None], vocabulary: int) -> str | None:
    """Returns the family's template that fits the special tokens, or None.

    Only phi-4 has `<|im_start|>` and `<|im_sep|>`. The others share `<|user|>`, `<|assistant|>` and
    `<|end|>`; of these phi-4-mini, which writes no newlines, has 200,000 tokens, the next largest 100,000.
    """

    def has(*tokens: str) -> bool:
        return all(token_to_id(token) is not None for token in tokens)

    if has("<|im_start|>", "<|im_sep|>", "<|im_end|>"):
        return PHI4_TEMPLATE
    if has("<|user|>", "<|assistant|>", "<|end|>"):
        return PHI4_MINI_TEMPLATE if vocabulary > 150_000 else PHI3_MINI_TEMPLATE
    return None


def choose_template(chosen: str | None, own: str | Mapping[str, str] | None, tools: object) -> str:
    """Returns `chosen` (a template, or the name of one of several), else the tokenizer's own template."""
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


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any],
) -> str:
    """Renders the text of a conversation.

    Raises:
        UserError: the messages are not a conversation, or the template failed (with its own message).
    """
    _check_messages(messages)
    if continue_final_message and add_generation_prompt:
        raise UserError("continue_final_message and add_generation_prompt exclude each other")
    # The template gets plain data only: a sandbox cannot know which methods of objects are harmless.
    chat = _as_plain_data([dict(message) for message in messages], "messages")
    values = {
        name: _as_plain_data(value, name)
        for name, value in {"tools": None, "documents": None, **variables}.items()
    }
    if continue_final_message:
        if not isinstance(chat[-1]["content"], str):
            raise UserError(
                f"continue_final_message needs a final message of text, got {chat[-1]['content']!r:.80}"
            )
        chat[-1]["content"] += _CONTINUE_HERE
    try:
        text = _compile(template).render(messages=chat, add_generation_prompt=add_generation_prompt, **values)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template, line {error.lineno}: {error.message}") from error
    except Exception as error:  # an expression in a template can raise anything
        kind = "" if type(error) is jinja2.TemplateError else f" with {type(error).__name__}"
        raise UserError(f"chat template failed{kind}: {error}") from error
    if not continue_final_message:
        return text
    cut = text.rfind(_CONTINUE_HERE.rstrip())
    if cut < 0:
        raise UserError("continue_final_message: the chat template leaves out the final message")
    return text[:cut] if text.startswith(_CONTINUE_HERE, cut) else text[:cut].rstrip()


def _check_messages(messages: object) -> None:
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise UserError("messages is empty; expected at least one dict with 'role' and 'content'")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{index}] must be a dict, got {type(message).__name__} {message!r:.40}")
        if missing := [key for key in ("role", "content") if key not in message]:
            raise UserError(
                f"messages[{index}] has no {' and no '.join(missing)}; its keys are {list(message)}"
            )
        if not isinstance(message["role"], str):
            raise UserError(f"messages[{index}]['role'] must be a str, got {message['role']!r:.40}")


def _as_plain_data(value: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat template: {name} must consist of JSON values: {error}") from error


class _GenerationBlocks(Extension):
    """Renders `{% generation %}...{% endgeneration %}`, a mark for training, as its content."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON without the escapes for HTML that Jinja's own `tojson` adds."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
