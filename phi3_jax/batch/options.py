"""The generation options of a request, as numbers that can differ between the rows of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.errors import UserError
from phi3_jax.generation import processors as rules
from phi3_jax.generation import warpers
from phi3_jax.generation.largest import argmax
from phi3_jax.generation.sequences import Sequences
from phi3_jax.sizes import INT32_MAX


@dataclass(frozen=True)
class RowOptions:
    """The options by which the tokens of a row are chosen; the defaults are those of greedy search.

    The names are those of GenerationConfig. A temperature of 0 is greedy search, which ignores top_k, top_p
    and min_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_new_tokens: int = 0
    seed: int = 0
    """The draws are those of `generate` with this seed and the prompt alone."""

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: "RowOptions") -> "RowOptions":
        """Returns the row options among `options`, with `defaults` for those that are missing.

        Raises:
            UserError: a value is invalid; the message names it.
        """
        names = {each.name for each in fields(cls)}
        values = vars(defaults) | {name: value for name, value in options.items() if name in names}
        seed, temperature = values["seed"], values["temperature"]
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1")
        checked = {name: value for name, value in values.items() if name != "seed"}
        if temperature == 0 and not isinstance(temperature, bool):
            del checked["temperature"]
        GenerationConfig(**checked)  # raises the errors
        return cls(**values)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether every step takes the likeliest token by the model's own scores."""
        return self == RowOptions(seed=self.seed) or (
            self.temperature == 0
            and (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
            and self.min_new_tokens == 0
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GreedyRows(rules.LogitsProcessor):
    """Masks all tokens but the likeliest in some rows, so that a draw from them is greedy."""

    rows: Bool[Array, "R 1"]

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        tokens = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
        best = tokens == argmax(scores)[:, None]
        return jnp.where(self.rows & ~best, -jnp.inf, scores)


def row_processors(options: Sequence[RowOptions], end_tokens: Array) -> rules.LogitsProcessorList:
    """Returns one list of processors for all rows, in `generate`'s order.

    A processor leaves the rows unchanged whose options do not ask for it.
    """

    def per_row(name: str, dtype: Any = np.float32) -> Array:
        return jnp.asarray(np.array([getattr(each, name) for each in options], dtype)[:, None])

    temperature, top_k = per_row("temperature"), per_row("top_k", np.int32)
    greedy = temperature == 0
    chain = (
        rules.RepetitionPenaltyLogitsProcessor(per_row("repetition_penalty")),
        rules.FrequencyPenaltyLogitsProcessor(per_row("frequency_penalty")),
        rules.PresencePenaltyLogitsProcessor(per_row("presence_penalty")),
        rules.MinNewTokensLengthLogitsProcessor(per_row("min_new_tokens", np.int32)[:, 0], end_tokens),
        GreedyRows(greedy),
        warpers.TemperatureLogitsWarper(jnp.where(greedy, 1.0, temperature)),
        warpers.TopKLogitsWarper(jnp.where(top_k == 0, INT32_MAX, top_k)),
        warpers.TopPLogitsWarper(per_row("top_p")),
        warpers.MinPLogitsWarper(per_row("min_p")),
    )
    return rules.LogitsProcessorList(chain)


def row_keys(options: Sequence[RowOptions]) -> Key[Array, " R"]:
    """Returns the random key of each row, which is that of `generate` with its seed and one row."""
    seeds = jnp.asarray(np.array([each.seed for each in options], np.uint32))
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds)
