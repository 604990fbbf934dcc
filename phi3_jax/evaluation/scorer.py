"""Scores each token of long texts with a model, under any rope frequencies."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache import KVCache
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_bytes, token_capacity
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.sizes import power_of_two, round_up

CHUNK = 512
"""Tokens of a row that go through the model at a time."""

POSITIONS = 512
"""Positions, of all rows together, that have logits at a time."""

NARROWEST = 16
"""The fewest tokens of a chunk; chunks of short texts have a power of two of tokens."""

OnProgress = Callable[[int], None]
"""Called with the number of tokens, of all rows, that the model has read since the last call."""


class Scores(NamedTuple):
    """Scores of the tokens [scored_from, T) of each row."""

    losses: Float[np.ndarray, "B scored"]
    """-log p, float32, in nats."""
    greedy: Bool[np.ndarray, "B scored"]
    """Whether the token is the most likely one."""

    @property
    def total(self) -> Float[np.ndarray, " B"]:
        """The sum of losses of each row, in float64."""
        return self.losses.sum(axis=1, dtype=np.float64)


class Scorer:
    """Scores texts of any length with a model, a chunk at a time through its cache.

    Frequencies are arguments of the compiled programs, so that all ropes share the programs: one for each
    size of the cache (two sizes an octave), and one for the head, which gets only chunks with scored tokens.
    Memory holds one cache and the logits of 512 positions.

    Args:
        model: on one device or on a mesh, for which padding rows are added until it divides them. With an
            abstract model, only the memory can be checked, before the model is loaded.
        chunk: tokens of a row that the model reads at a time.
    """

    def __init__(self, model: Phi3ForCausalLM | CompiledModel, *, chunk: int = CHUNK):
        self.compiled = model if isinstance(model, CompiledModel) else CompiledModel(model)
        self._chunk = chunk

    @property
    def config(self) -> Phi3Config:
        """The config of the model; `score` does not use its rope."""
        return self.compiled.model.config

    def fits(self, length: int, rows: int = 1) -> bool:
        """Returns whether the caches for `rows` texts of `length` tokens fit in memory."""
        return self._all_slots(length, rows) <= token_capacity(self.compiled)

    def memory(self, length: int, rows: int = 1) -> int:
        """Returns the bytes of the caches for `rows` texts of `length` tokens."""
        return self._all_slots(length, rows) * token_bytes(self.compiled)

    def check_memory(self, length: int, rows: int = 1) -> None:
        """Checks that the caches for `rows` texts of `length` tokens fit in memory.

        Raises:
            UserError: they do not; the message has the needed and the free memory.
        """
        if self.fits(length, rows):
            return
        needed, room = self._all_slots(length, rows), token_capacity(self.compiled)
        each = token_bytes(self.compiled)
        texts = f"{rows} rows of {length:,} tokens need" if rows > 1 else f"{length:,} tokens need"
        raise UserError(
            f"{texts} {needed * each / 2**30:.2f} GiB for keys and values, and memory has "
            f"{room * each / 2**30:.2f} GiB for them; choose a smaller length"
            + (" or fewer rows" if rows > 1 else "")
        )

    def padded(self, length: int) -> int:
        """Returns the number of tokens that are computed for a text of `length` tokens."""
        return round_up(length - 1, self._width(length))

    def score(
        self,
        tokens: Int[np.ndarray, "..."],
        inv_freq: Float[np.ndarray, "..."] | LayerFrequencies,
        attention_scaling: Float[np.ndarray, "..."] | float = 1.0,
        *,
        initial_tokens: Int[np.ndarray, "..."] | int = 0,
        scored_from: int = 1,
        progress: OnProgress | None = None,
    ) -> Scores:
        """Scores rows of tokens, each under its own frequencies.

        Args:
            tokens: [T], for all rows, or [B, T]. Rows may be padded on the right with any tokens, since no
                token sees later ones.
            inv_freq: rope frequencies for the whole length of a row, [P] or [B, P]; `LayerFrequencies` for
                each layer or key/value head, which have programs of their own.
            attention_scaling: factor of cosine and sine, one number or [B]; not beside `LayerFrequencies`.
            initial_tokens: how many first tokens of a row have the model's unscaled frequencies (LongRoPE,
                arXiv:2402.13753, section 3.1), one number or [B].
            scored_from: the first token that is scored, at least 1.

        Raises:
            UserError: there is nothing to score, or shapes or numbers of rows do not fit.
        """
        tokens, arguments = self._rows(tokens, inv_freq, attention_scaling, initial_tokens)
        rows, length = tokens.shape
        if not 1 <= scored_from < length:
            raise UserError(f"scored_from={scored_from} must be from 1 to {length - 1}, for {length} tokens")
        all_rows = self.compiled.rows_for(rows)
        extra = all_rows - rows
        padded_arguments = [np.concatenate([each, np.repeat(each[:1], extra, axis=0)]) for each in arguments]
        width = self._width(length)
        # The last token predicts nothing, and no token sees the padding of the last chunk.
        padded = np.zeros((all_rows, self.padded(length) + 1), np.int32)
        padded[:rows, :length] = tokens
        padded[rows:, :length] = tokens[:1]
        model = self.compiled.model
        cache = model.init_cache(all_rows, self._slots(length), model.cache_dtype)
        hidden: Any = None
        parts = []
        for start in range(0, length - 1, width):
            end = start + width
            before = hidden
            hidden, cache = self.compiled(_feed, cache, padded[:, start:end], *padded_arguments)
            if end >= scored_from:
                parts.append(self.compiled(_score, None, hidden, padded[:, start + 1 : end + 1]))
            jax.block_until_ready(before)  # the host is one chunk ahead of the device
            if progress is not None:
                progress(rows * (min(end, length - 1) - start))
        skipped = (scored_from - 1) % width
        losses, greedy = (np.concatenate(each, axis=1) for each in zip(*jax.device_get(parts), strict=True))
        here = np.s_[:rows, skipped : skipped + length - scored_from]
        return Scores(losses[here], greedy[here])

    def read(
        self,
        tokens: Int[np.ndarray, " T"],
        inv_freq: Float[np.ndarray, "..."] | LayerFrequencies,
        attention_scaling: float = 1.0,
        *,
        initial_tokens: int = 0,
        spare: int,
        progress: OnProgress | None = None,
    ) -> tuple[KVCache, list[np.ndarray]]:
        """Reads a whole text, as `score` does.

        Returns:
            The cache with the text, with `spare` free slots or more; and for each row of the cache, which all
            hold the text, the arguments of `rope_arguments` after the positions.

        Raises:
            UserError: the arguments have several rows, or shapes do not fit.
        """
        text, arguments = self._rows(tokens, inv_freq, attention_scaling, initial_tokens)
        if len(text) > 1:
            raise UserError(f"tokens and frequencies have {len(text)} rows; read one at a time")
        rows, length, width = self.compiled.rows_for(1), text.shape[1], self._width(text.shape[1])
        arguments = [np.repeat(each, rows, axis=0) for each in arguments]
        padded = np.zeros((rows, round_up(length, width)), np.int32)
        padded[:, :length] = text
        model = self.compiled.model
        cache = model.init_cache(rows, self._slots(length + spare + 1), model.cache_dtype)
        for start in range(0, length, width):
            _, cache = self.compiled(_feed, cache, padded[:, start : start + width], *arguments)
            jax.block_until_ready(cache.length)
            if progress is not None:
                progress(min(start + width, length) - start)
        return cache.rewind(np.full(rows, length, np.int32)), arguments

    def _rows(self, tokens: Any, *arguments: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """Broadcasts all arguments to the same number of rows; `LayerFrequencies` to [B, L, K or 1, P]."""
        inv_freq, scaling, initial_tokens = arguments
        by_layer = isinstance(inv_freq, LayerFrequencies)
        if by_layer:
            if np.ndim(scaling) or scaling != 1:
                raise UserError("LayerFrequencies has its own attention_scaling; give no other")
            inv_freq, scaling = inv_freq.with_all_axes(self.config, None)
            inv_freq = inv_freq.squeeze(1)
        given = [np.asarray(each) for each in (tokens, inv_freq, scaling, initial_tokens)]
        kinds = (np.int32, np.float32, np.float32, np.int32)
        without_rows = (1, 3, 2, 0) if by_layer else (1, 1, 0, 0)
        shaped = [
            each.astype(kind)[None] if each.ndim == ndim else each.astype(kind)
            for each, kind, ndim in zip(given, kinds, without_rows, strict=True)
        ]
        rows = max(map(len, shaped))
        if any(len(each) not in (1, rows) for each in shaped):
            counts = ", ".join(str(len(each)) for each in shaped)
            raise UserError(
                f"tokens, inv_freq, attention_scaling and initial_tokens have {counts} rows; each must have "
                "one, or as many as the others"
            )
        whole = [np.broadcast_to(each, (rows, *each.shape[1:])) for each in shaped]
        return whole[0], whole[1:]

    def _width(self, length: int) -> int:
        return min(self._chunk, max(NARROWEST, power_of_two(length - 1)))

    def _slots(self, length: int) -> int:
        """Returns the slots of the cache for `length` tokens: a power of two of chunks, or 3/4 of one."""
        width, end = self._width(length), self.padded(length)
        size = width * power_of_two(end // width)
        smaller = size * 3 // 4
        return smaller if smaller >= end and smaller % width == 0 else size

    def _all_slots(self, length: int, rows: int) -> int:
        return self.compiled.rows_for(rows) * self._slots(length)


def frequencies_for(config: Phi3Config, length: int) -> tuple[Float[np.ndarray, " P"], float]:
    """Returns the inverse frequencies and attention factor of a config's rope for `length` tokens."""
    inv_freq, scaling = config.rope_scaling.frequencies(config.rope_base, jnp.array([length], jnp.int32))
    return np.atleast_2d(np.asarray(inv_freq))[0], float(np.ravel(scaling)[0])


@lru_cache(maxsize=1024)
def frequencies_key(config: Phi3Config, length: int, initial_tokens: int = 0) -> str:
    """Returns a key of the frequencies for `length` tokens, under which measurements are stored.

    It depends on the numbers and not on the rope's name, since a formula or a list may change.
    """
    inv_freq, scaling = frequencies_for(config, length)
    content = inv_freq.tobytes() + np.float32(scaling).tobytes() + str(initial_tokens).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def rope_arguments(
    config: Phi3Config,
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "B P"] | Float[Array, "B L #K P"],
    attention_scaling: Float[Array, " B"] | Float[Array, "B L #K"],
    initial_tokens: Int[Array, " B"],
) -> dict[str, Any]:
    """Returns the decoder's arguments by which each row's first tokens keep the model's frequencies."""
    unscaled = positions < initial_tokens[:, None]
    plain = config.rope_base.inv_freq()[None, None]
    if inv_freq.ndim == 4:  # by layer
        frequencies = jnp.where(unscaled[..., None, None, None], plain[:, :, None, None], inv_freq[:, None])
        return {"inv_freq": LayerFrequencies(frequencies, attention_scaling)}
    frequencies = jnp.where(unscaled[..., None], plain, inv_freq[:, None])
    return {"inv_freq": frequencies, "attention_scaling": attention_scaling}


def _feed(
    model: Phi3ForCausalLM,
    cache: KVCache,
    ids: Int[Array, "B T"],
    inv_freq: Float[Array, "B P"] | Float[Array, "B L #K P"],
    attention_scaling: Float[Array, " B"] | Float[Array, "B L #K"],
    initial_tokens: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs the decoder on the next tokens; returns its output and the cache with them."""
    positions = cache.length[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)[None]  # [B, T]
    rope = rope_arguments(model.config, positions, inv_freq, attention_scaling, initial_tokens)
    out = model.decoder(ids, past_key_values=cache, **rope)
    assert out.past_key_values is not None
    return out.last_hidden_state, out.past_key_values


def _score(
    model: Phi3ForCausalLM, _: None, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns -log p of the targets, and whether each is the most likely token, block by block."""
    rows, length, _size = hidden.shape
    block = next(b for b in range(length, 0, -1) if length % b == 0 and (b * rows <= POSITIONS or b == 1))

    def blocks(x: Array) -> Array:
        return x.reshape(rows, length // block, block, *x.shape[2:]).swapaxes(0, 1)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        logits = model.logits(hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses, jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets

    scored = jax.lax.map(score, (blocks(hidden), blocks(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, length), scored)
