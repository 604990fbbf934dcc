"""Encodes a conversation, with the assistant's answers as labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from phi3_jax.errors import UserError
from phi3_jax.generation.sequences import common_prefix_length
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer

Writer: TypeAlias = Callable[..., str]
"""Writes the text of messages by the chat template."""

CONTENT_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a message that say something beside `content`, which many chat templates do not write."""


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Roles by what ShareGPT's format calls them."""


def as_messages(messages: Sequence[Any]) -> Sequence[Any]:
    """Returns messages with `role` and `content`; those of ShareGPT's format have `from` and `value`.

    Raises:
        UserError: a message is from somebody unknown.
    """
    if not all(isinstance(one, Mapping) and {"from", "value"} <= one.keys() for one in messages):
        return messages
    odd = next((one["from"] for one in messages if one["from"] not in ROLES), None)
    if odd is not None:
        raise UserError(f"a message is from {odd!r:.40}; expected one of {', '.join(ROLES)}")
    others = [{key: x for key, x in one.items() if key not in ("from", "value")} for one in messages]
    return [
        {"role": ROLES[one["from"]], "content": one["value"]} | rest
        for one, rest in zip(messages, others, strict=True)
    ]


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Phi3Tokenizer,
    max_length: int,
    tools: Sequence[Any] | None = None,
) -> tuple[list[int], list[int], bool]:
    """Returns the ids that `apply_chat_template` gives, labels, and whether `max_length` truncated them.

    The template tells where an answer starts: after its prompt, which must be a prefix of the whole text. It
    also tells where the turn ends: after the last special token before the next turn. The first message of a
    conversation answers nothing, so it has no labels, and neither has an answer with "weight": 0. A token
    that starts in the prompt and ends in the answer has one.

    Args:
        tools: descriptions of functions, which the template writes.

    Raises:
        UserError: there is no answer within `max_length`, the template writes a turn differently depending on
            what follows, or it leaves out the tools or a key of `CONTENT_KEYS`.
    """

    def write(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **{"tools": tools or None} | options)

    text = write(messages)
    _check_nothing_is_left_out(messages, text, write, tools)
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels = [IGNORE_INDEX] * len(ids)
    weights = [_weight(number, message) for number, message in enumerate(messages)]
    roles = [message["role"] for message in messages]
    answers = [turn for turn in range(1, len(messages)) if roles[turn] == "assistant" and weights[turn]]
    if not answers:
        dropped = ' with a "weight" other than 0' if "assistant" in roles[1:] else ""
        raise UserError(f"messages have no answer of the assistant{dropped} to learn from")
    offset = (0, 0)
    for turn in answers:
        start = _start(messages, turn, text, write)
        end = _end(messages, turn, text, start, tokenizer, write)
        first = _token_at(text, start, ids, offset, tokenizer)
        if first >= max_length:
            break
        offset = start, first
        last = _token_at(text, end, ids, offset, tokenizer)
        labels[first:last] = ids[first:last]
    labels = labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        raise UserError(
            f"no answer of the assistant starts within max_length={max_length}; the conversation has "
            f"{len(ids)} ids"
        )
    return ids[:max_length], labels, len(ids) > max_length


def _weight(number: int, message: Mapping[str, Any]) -> int:
    """Returns 0 for a message that is not to be learnt, and 1 for any other."""
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f"messages[{number}] has the weight {weight!r:.40}; expected 0 or 1")
    return int(weight)


def _check_nothing_is_left_out(
    messages: Sequence[Mapping[str, Any]], text: str, write: Writer, tools: Sequence[Any] | None
) -> None:
    """Checks that the template writes the tools and what messages say beside their content.

    Raises:
        UserError: the text is the same without them.
    """
    advice = "; remove it, or give the tokenizer a chat_template that does"
    if tools and write(messages, tools=None) == text:
        raise UserError(f"the chat template does not write tools{advice}")
    for number, message in enumerate(messages):
        for key in CONTENT_KEYS:
            if not message.get(key):
                continue
            without = {name: value for name, value in message.items() if name != key}
            if write([*messages[:number], without, *messages[number + 1 :]]) == text:
                raise UserError(
                    f"messages[{number}] has {key!r}, which the chat template does not write{advice}"
                )


def _start(messages: Sequence[Mapping[str, Any]], turn: int, text: str, write: Writer) -> int:
    """Returns the position in `text` at which the content of a turn starts."""
    prompt = write(messages[:turn], add_generation_prompt=True)
    if not text.startswith(prompt):
        raise UserError(
            f"the chat template's prompt for messages[{turn}] is not a prefix of the whole conversation, so "
            "the answer cannot be located; give the tokenizer another chat_template"
        )
    return len(prompt)


def _end(
    messages: Sequence[Mapping[str, Any]],
    turn: int,
    text: str,
    start: int,
    tokenizer: Phi3Tokenizer,
    write: Writer,
) -> int:
    """Returns the position in `text` at which the turn ends whose content starts at `start`."""
    until_here = text
    if turn + 1 < len(messages):
        until_here = write(messages[: turn + 1])
    # Some templates add a token to the end of the conversation, which is not there if messages follow.
    end = start + common_prefix_length([*text[start:]], [*until_here[start:]])
    backend = tokenizer.backend
    specials = filter(None, map(backend.id_to_token, backend.special_ids))
    ends = [at + len(special) for special in specials if (at := text.rfind(special, start, end)) >= 0]
    closed = max(ends, default=start)
    whole = text.startswith(until_here)
    if not whole and (closed == start or not until_here.startswith(text[:start])):
        raise UserError(
            f"the chat template writes messages[{turn}] differently when other messages follow, so the "
            "answer to learn is ambiguous; give the tokenizer another chat_template"
        )
    # After the last special token only white space of the template may follow; otherwise that token is a
    # part of the answer.
    return end if whole and (closed == start or text[closed:end].strip()) else closed


def _token_at(text: str, at: int, ids: list[int], offset: tuple[int, int], tokenizer: Phi3Tokenizer) -> int:
    """Returns the number of ids before character `at`; before character `offset[0]` it is `offset[1]`."""
    start, count = offset
    piece = tokenizer.encode(text[start:at], add_special_tokens=False)
    if ids[count : count + len(piece)] == piece:
        return count + len(piece)
    # The tokenizer splits the piece differently within the text. Encoding from the start is safe, but slower.
    return common_prefix_length(tokenizer.encode(text[:at], add_special_tokens=False), ids)
