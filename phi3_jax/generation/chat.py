"""A conversation with one model: its history, and a key/value cache that is kept from turn to turn."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from phi3_jax.cache.cache import KVCache
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.generate import Call
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sequences import common_prefix_length
from phi3_jax.generation.stream import single_sequence_call
from phi3_jax.parallel.distributed import from_primary_on
from phi3_jax.runs.files import write_text
from phi3_jax.runs.text import parse_json
from phi3_jax.tokenizer import Phi3Tokenizer

Message = dict[str, str]
"""`role` and `content`, as in chat templates."""


_LARGEST = 1 << 28
"""Bytes; no conversation is longer."""


class ContextFullError(UserError):
    """The conversation has no room for an answer in the model's context."""


@dataclass(frozen=True)
class Turn:
    """Counts the tokens of one answer and says why it ended."""

    prompt_tokens: int
    """The tokens of the whole conversation up to the answer."""
    cached_tokens: int
    """The prompt's tokens that the cache already had."""
    new_tokens: int = 0
    stopped: Literal["end", "max_new_tokens", "context", "reader"] = "reader"
    """Here "end" means an end token or one of `stop_strings`."""


@dataclass(frozen=True)
class _CachedTokens:
    """A cache and the token ids whose keys and values it has."""

    cache: KVCache
    ids: Sequence[int]

    def common_prefix(self, ids: Sequence[int]) -> "_CachedTokens | None":
        """Returns the part that is a prefix of `ids` without its last token, or None if there is none."""
        common = common_prefix_length(self.ids, ids[:-1])
        if common == 0:
            return None
        # Padding comes before the tokens, so slots are counted from the end.
        slots = self.cache.length - jnp.int32(len(self.ids) - common)
        try:
            return _CachedTokens(self.cache.rewind(slots), self.ids[:common])
        except UserError:  # a sliding window's cache no longer has the earlier slots
            return None


class ChatSession:
    """A conversation: `for piece in session.reply("Hi"): ...` answers and remembers the turn.

    Args:
        model, tokenizer: of one checkpoint, such as a `Pipeline` has.
        system: the system message, before all others; `session.system` may be changed at any time.
        seed: of the draws, which differ from turn to turn; default: a new one for every turn.
        max_new_tokens: the limit of an answer.
        options: any other argument of `Phi3ForCausalLM.generate` for one sequence without beams.

    Attributes:
        history: the messages up to now, without `system`; a running answer grows in it.
        last: the latest turn; None before the first.
    """

    def __init__(
        self,
        model: CausalLM | CompiledModel,
        tokenizer: Phi3Tokenizer,
        *,
        system: str | None = None,
        seed: int | None = None,
        max_new_tokens: int = 512,
        **options: Any,
    ):
        self.compiled = model if isinstance(model, CompiledModel) else CompiledModel(model)
        self.tokenizer, self.system = tokenizer, system
        self.history: list[Message] = []
        self.last: Turn | None = None
        self._seed, self._turns = seed, 0
        self._max_new_tokens, self._options = max_new_tokens, options
        self._cached: _CachedTokens | None = None

    @property
    def messages(self) -> list[Message]:
        """The system message and the history, as in chat templates."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.history]

    def reply(self, text: str) -> Generator[str, None, None]:
        """Answers `text`; yields the answer in pieces during generation.

        Both messages enter the history with the first token. When closed early, the answer is the text up to
        then. An exception from the device's work (Ctrl-C may be one) loses only the cache.

        Raises:
            ContextFullError: the context has no room for an answer; the history is unchanged.
            UserError: the template rejects the messages, or `generate` the options.
        """
        question = {"role": "user", "content": text}
        ids = self.tokenizer.apply_chat_template([*self.messages, question], add_generation_prompt=True)
        context = self.compiled.model.config.context_length
        if len(ids) >= context:
            raise ContextFullError(
                f"with this message the conversation has {len(ids)} tokens, and the model's context of "
                f"{context} leaves no room for an answer; start a new conversation with /reset, or say less"
            )
        cached = self._cached.common_prefix(ids) if self._cached else None
        call = single_sequence_call(
            self.compiled,
            ids,
            attention_mask=np.ones((1, len(ids)), np.int32),  # no id means padding here
            past_key_values=cached and cached.cache,
            max_new_tokens=min(self._max_new_tokens, context - len(ids)),
            seed=self._next_seed(),
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            **self._options,
        )
        return self._answer(question, call, Turn(len(ids), len(cached.ids) if cached else 0))

    def _answer(self, question: Message, call: Call, turn: Turn) -> Generator[str, None, None]:
        answer = {"role": "assistant", "content": ""}
        decoder = self.tokenizer.stream()
        self._cached, self.last, read = None, turn, True
        with closing(call.run()) as steps:
            try:
                for (token,) in steps:
                    if not turn.new_tokens:
                        self.history += [question, answer]
                    turn = self.last = replace(turn, new_tokens=turn.new_tokens + 1)
                    answer["content"] += (piece := decoder.put(int(token)))
                    if piece:
                        yield piece
            except GeneratorExit:
                read = False
        if turn.new_tokens:
            self._keep_cache(call)
        answer["content"] += (piece := decoder.end())
        if read:
            self.last = replace(turn, stopped=self._stop_reason(call, turn.new_tokens, int(token)))
            if piece:
                yield piece

    def _keep_cache(self, call: Call) -> None:
        """Keeps the call's cache, which has every token but the last."""
        out = call.result()
        self._cached = _CachedTokens(out.past_key_values, out.sequences[0].tolist()[:-1])

    def _stop_reason(self, call: Call, new: int, latest: int) -> Literal["end", "max_new_tokens", "context"]:
        """Returns why an answer that was read to its end has ended."""
        config = call.request.config
        if new < config.max_new_tokens or latest in config.eos_token_ids:
            return "end"
        return "max_new_tokens" if new == self._max_new_tokens else "context"

    def _next_seed(self) -> int | None:
        """Returns another seed for every turn, the same in every session with this seed."""
        self._turns += 1
        if self._seed is None:
            return None
        mixed = np.random.SeedSequence([abs(self._seed), int(self._seed < 0), self._turns])
        return int(mixed.generate_state(1)[0])

    def reset(self) -> None:
        """Clears the history; `system` stays."""
        self.history = []  # a new list, because a running answer still writes into the old one

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages as JSON, whole or not at all; process 0 writes for all.

        Raises:
            UserError: there is a file of that name which is no saved conversation. OSError: it cannot be
                written.
        """
        content = json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        file = Path(path)

        def write() -> None:
            if file.exists() and not _is_conversation(file):
                raise UserError(f"{file} exists and is no saved conversation; choose another name")
            write_text(file, content)

        from_primary_on(self.compiled.mesh, write)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues the conversation that `save` wrote, with its system message; process 0 reads for all.

        Raises:
            UserError: the file holds no conversation; this one is unchanged. OSError: it cannot be read.
        """
        file = Path(path)
        content = parse_json(from_primary_on(self.compiled.mesh, file.read_bytes), file)
        try:
            messages = _check_messages(content)
        except UserError as error:
            raise UserError(f"{file} is not a saved conversation: {error}") from error
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = system[0]["content"] if system else None
        self.history = messages[len(system) :]


def _is_conversation(file: Path) -> bool:
    """Returns whether `save` may have written the file; a file of weights is not read for that."""
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return False
    try:
        _check_messages(parse_json(file.read_bytes(), file))
    except UserError:
        return False
    return True


def _check_messages(content: Any) -> list[Message]:
    """Returns the messages: a system message or none, then the user's and the assistant's in turns."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError('expected {"messages": [...]}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UserError(f"message {number} is {message!r:.60}; expected role and content, both text")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"its roles are {', '.join(roles)}; expected user and assistant in turns, perhaps after a system "
            "message"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
