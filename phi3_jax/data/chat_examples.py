"""A conversation as ids, with the assistant's words as labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Phi3Tokenizer, max_length: int
) -> tuple[list[int], list[int], bool]:
    """Ids as `apply_chat_template` gives them, labels, and whether they were cut off at `max_length`.

    The template says where an answer begins (behind the prompt for it, which is the beginning of the whole
    text) and where its turn ends (with the last special token before the next turn). A conversation's first
    message answers nothing and is not counted. A token that begins in the prompt and ends in the answer is.

    Raises:
        ValueError: no conversation, nothing to learn, or a template that writes a turn differently according
            to what follows.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels = [IGNORE_INDEX] * len(ids)
    answers = [turn for turn in range(1, len(messages)) if messages[turn]["role"] == "assistant"]
    if not answers:
        raise UserError("messages have no answer of the assistant's to learn from")
    known = (0, 0)
    for turn in answers:
        start = _start(messages, turn, text, tokenizer)
        end = _end(messages, turn, text, start, tokenizer)
        first = _token_at(text, start, ids, known, tokenizer)
        if first >= max_length:
            break
        known = start, first
        last = _token_at(text, end, ids, known, tokenizer)
        labels[first:last] = ids[first:last]
    labels = labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        raise UserError(
            f"no answer of the assistant's begins within max_length={max_length}; it has {len(ids)} ids"
        )
    return ids[:max_length], labels, len(ids) > max_length


def _start(messages: Sequence[Mapping[str, Any]], turn: int, text: str, tokenizer: Phi3Tokenizer) -> int:
    """Where in `text` the words of a turn begin."""
    prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise UserError(
            f"the chat template's prompt for messages[{turn}] is not the beginning of the whole "
            "conversation, so the answer cannot be told from it; give the tokenizer another chat_template"
        )
    return len(prompt)


def _end(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, start: int, tokenizer: Phi3Tokenizer
) -> int:
    """Where in `text` a turn ends that has its words at `start`."""
    until_here = text
    if turn + 1 < len(messages):
        until_here = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    # Some templates end every conversation with a token that is not there when it goes on.
    end = start + _common(text[start:], until_here[start:])
    backend = tokenizer.backend
    specials = filter(None, map(backend.id_to_token, backend.special_ids))
    ends = [at + len(special) for special in specials if (at := text.rfind(special, start, end)) >= 0]
    closed = max(ends, default=start)
    whole = text.startswith(until_here)
    if not whole and (closed == start or not until_here.startswith(text[:start])):
        raise UserError(
            f"the chat template writes messages[{turn}] differently when other messages follow, so it is not "
            "known what to learn; give the tokenizer another chat_template"
        )
    # Only white space of the template's may follow; a special token before words is a part of the answer.
    return end if whole and (closed == start or text[closed:end].strip()) else closed


def _token_at(text: str, at: int, ids: list[int], known: tuple[int, int], tokenizer: Phi3Tokenizer) -> int:
    """How many of the text's ids lie before character `at`; of character `known[0]` it is `known[1]`."""
    begin, count = known
    piece = tokenizer.encode(text[begin:at], add_special_tokens=False)
    if ids[count : count + len(piece)] == piece:
        return count + len(piece)
    # The piece alone is split otherwise than within the text; all from the beginning is safe, and slower.
    return _common(tokenizer.encode(text[:at], add_special_tokens=False), ids)


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How much two sequences have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
