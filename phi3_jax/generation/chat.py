"""A conversation with one model: its history, and the key/value cache kept from turn to turn."""

import json
import os
import tempfile
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
from phi3_jax.generation.stream import one_answer
from phi3_jax.parallel.distributed import from_primary_on
from phi3_jax.tokenizer import Phi3Tokenizer

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""


class ContextFullError(UserError):
    """The conversation has no room for an answer in the model's context."""


@dataclass(frozen=True)
class Turn:
    """What an answer took. `stopped` is "end" for the model's own end, or for a text of `stop_strings`."""

    prompt_tokens: int
    """The whole conversation up to the answer."""
    cached_tokens: int
    """Those of them that were not computed again."""
    new_tokens: int = 0
    stopped: Literal["end", "max_new_tokens", "context", "reader"] = "reader"


@dataclass(frozen=True)
class _Held:
    """A cache and the ids whose keys and values it has."""

    cache: KVCache
    ids: Sequence[int]

    def beginning_of(self, ids: Sequence[int]) -> "_Held | None":
        """As much as is the beginning of `ids`, whose last token has to be computed anyway; None: nothing."""
        common = common_prefix_length(self.ids, ids[:-1])
        if common == 0:
            return None
        # Padding lies in front of the tokens, so slots are counted from behind.
        slots = self.cache.length - jnp.int32(len(self.ids) - common)
        try:
            return _Held(self.cache.rewind(slots), self.ids[:common])
        except ValueError:  # a sliding window's cache has forgotten what came before
            return None


class ChatSession:
    """A conversation: `for piece in session.reply("Hi"): ...` answers, and knows of it in the next turn.

    Args:
        model, tokenizer: of one checkpoint, such as a `Pipeline` has.
        system: what the model is told before everything else; `session.system` may be changed at any time.
        seed: of the draws, different ones in every turn; default: others every time.
        max_new_tokens: the most that an answer may have.
        options: any other argument of `Phi3ForCausalLM.generate` for one sequence without beams.

    Attributes:
        history: the messages said so far, without `system`; a running answer grows in it.
        last: what the latest answer took; None before one.
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
        self._held: _Held | None = None

    @property
    def messages(self) -> list[Message]:
        """The history behind the system message, as templates take it."""
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*told, *self.history]

    def reply(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, in pieces as it is made.

        With its first token both are in the history. Closed early, the answer is what was said until then. An
        exception out of the device's work (Ctrl-C may be one) costs the cache and no more.

        Raises:
            ContextFullError: no room is left in the context; the history stays as it was.
            ValueError: the template refuses the messages, or `generate` the options.
        """
        ask = {"role": "user", "content": text}
        ids = self.tokenizer.apply_chat_template([*self.messages, ask], add_generation_prompt=True)
        context = self.compiled.model.config.context_length
        if len(ids) >= context:
            raise ContextFullError(
                f"with this message the conversation has {len(ids)} tokens, and the model's context of "
                f"{context} leaves no room for an answer; start a new conversation with /reset, or say less"
            )
        held = self._held.beginning_of(ids) if self._held else None
        call = one_answer(
            self.compiled,
            ids,
            attention_mask=np.ones((1, len(ids)), np.int32),  # no id means padding here
            past_key_values=held and held.cache,
            max_new_tokens=min(self._max_new_tokens, context - len(ids)),
            seed=self._next_seed(),
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            **self._options,
        )
        return self._answer(ask, call, Turn(len(ids), len(held.ids) if held else 0))

    def _answer(self, ask: Message, call: Call, turn: Turn) -> Generator[str, None, None]:
        said = {"role": "assistant", "content": ""}
        decoder = self.tokenizer.stream()
        self._held, self.last, read = None, turn, True
        with closing(call.run()) as steps:
            try:
                for (token,) in steps:
                    if not turn.new_tokens:
                        self.history += [ask, said]
                    turn = self.last = replace(turn, new_tokens=turn.new_tokens + 1)
                    said["content"] += (piece := decoder.put(int(token)))
                    if piece:
                        yield piece
            except GeneratorExit:
                read = False
        if turn.new_tokens:
            self._keep(call)
        said["content"] += (piece := decoder.end())
        if read:
            self.last = replace(turn, stopped=self._why(call, turn.new_tokens, int(token)))
            if piece:
                yield piece

    def _keep(self, call: Call) -> None:
        """Takes over the call's cache, which has every token but the last."""
        out = call.result()
        self._held = _Held(out.past_key_values, out.sequences[0].tolist()[:-1])

    def _why(self, call: Call, made: int, latest: int) -> Literal["end", "max_new_tokens", "context"]:
        """Why an answer that was read to its end is over."""
        config = call.request.config
        if made < config.max_new_tokens or latest in config.eos_token_ids:
            return "end"
        return "max_new_tokens" if made == self._max_new_tokens else "context"

    def _next_seed(self) -> int | None:
        """One of its own for every turn of a session, the same in every session with this seed."""
        self._turns += 1
        if self._seed is None:
            return None
        mixed = np.random.SeedSequence([abs(self._seed), int(self._seed < 0), self._turns])
        return int(mixed.generate_state(1)[0])

    def reset(self) -> None:
        """Forgets what was said; `system` stays."""
        self.history = []  # a list of its own: an answer that still runs writes into the old one

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages as JSON, whole or not at all; of several processes, process 0 does."""
        from_primary_on(self.compiled.mesh, lambda: self._write(Path(path)))

    def _write(self, target: Path) -> None:
        content = json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
            written = Path(work) / target.name
            written.write_text(content, encoding="utf-8")
            os.replace(written, target)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote, its system message included; of several processes, process 0 reads.

        Raises:
            ValueError: the file holds no conversation; this one stays as it was. OSError: it cannot be read.
        """
        file = Path(path)
        try:
            text = from_primary_on(self.compiled.mesh, lambda: file.read_text(encoding="utf-8"))
            messages = _checked(json.loads(text))
        except ValueError as error:  # JSON's and Unicode's are of this kind
            raise UserError(f"{file} is not a saved conversation: {error}") from error
        told = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = told[0]["content"] if told else None
        self.history = messages[len(told) :]


def _checked(content: Any) -> list[Message]:
    """The messages: perhaps one of the system, then a user's and an assistant's in turns."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError('expected {"messages": [...]}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UserError(f"message {number} is {message!r:.60}; expected role and content, both text")
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(
            f"its roles are {', '.join(roles)}; expected user and assistant in turns, behind a system or not"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
