"""Encodes a conversation, with the assistant's answers as labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.generation.sequences import common_prefix_length
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Phi3Tokenizer, max_length: int
) -> tuple[list[int], list[int], bool]:
    """Returns the ids that `apply_chat_template` gives, labels, and whether `max_length` truncated them.

    The template tells where an answer starts: after its prompt, which must be a prefix of the whole text. It
    also tells where the turn ends: after the last special token before the next turn. The first message of a
    conversation answers nothing, so it has no labels. A token that starts in the prompt and ends in the
    answer has one.

    Raises:
        UserError: there is no answer within `max_length`, or the template writes a turn differently depending
            on what follows.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels = [IGNORE_INDEX] * len(ids)
    answers = [turn for turn in range(1, len(messages)) if messages[turn]["role"] == "assistant"]
    if not answers:
        raise UserError("messages have no answer of the assistant to learn from")
    offset = (0, 0)
    for turn in answers:
        start = _start(messages, turn, text, tokenizer)
        end = _end(messages, turn, text, start, tokenizer)
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


def _start(messages: Sequence[Mapping[str, Any]], turn: int, text: str, tokenizer: Phi3Tokenizer) -> int:
    """Returns the position in `text` at which the content of a turn starts."""
    prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise UserError(
            f"the chat template's prompt for messages[{turn}] is not a prefix of the whole conversation, so "
            "the answer cannot be located; give the tokenizer another chat_template"
        )
    return len(prompt)


def _end(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, start: int, tokenizer: Phi3Tokenizer
) -> int:
    """Returns the position in `text` at which the turn ends whose content starts at `start`."""
    until_here = text
    if turn + 1 < len(messages):
        until_here = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
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
