"""What a line may say about its own answer, as numbers that rows of one program can differ in."""

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
from phi3_jax.generation.sequences import Sequences

EVERY_TOKEN = np.iinfo(np.int32).max


@dataclass(frozen=True)
class RowOptions:
    """How a row's tokens are chosen; as they stand, every step takes the likeliest one.

    Names are GenerationConfig's. A temperature of 0 is greedy search, in which the next three do nothing.
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
    """Of the draws; the same as `generate`'s for the prompt alone."""

    @classmethod
    def of(cls, said: Mapping[str, Any], default: "RowOptions") -> "RowOptions":
        """Those that a line said, `default` for the others.

        Raises:
            ValueError: a value that cannot be; the text names it.
        """
        names = {each.name for each in fields(cls)}
        values = vars(default) | {name: value for name, value in said.items() if name in names}
        seed, temperature = values["seed"], values["temperature"]
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1")
        checked = {name: value for name, value in values.items() if name != "seed"}
        if temperature == 0 and not isinstance(temperature, bool):
            del checked["temperature"]
        GenerationConfig(**checked)  # its checks, and its words
        return cls(**values)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, whatever was there before."""
        return self == RowOptions(seed=self.seed) or (
            self.temperature == 0
            and (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
            and self.min_new_tokens == 0
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GreedyRows(rules.LogitsProcessor):
    """Leaves the likeliest token alone in some rows, so that a draw can give nothing else."""

    rows: Bool[Array, "R 1"]

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        best = jnp.arange(scores.shape[1]) == jnp.argmax(scores, axis=-1)[:, None]
        return jnp.where(self.rows & ~best, -jnp.inf, scores)


def processors(options: Sequence[RowOptions], end_tokens: Array) -> rules.LogitsProcessorList:
    """One chain for all rows, in `generate`'s order; what a row does not ask for changes nothing in it."""

    def column(name: str, dtype: Any = np.float32) -> Array:
        return jnp.asarray(np.array([getattr(each, name) for each in options], dtype)[:, None])

    temperature, top_k = column("temperature"), column("top_k", np.int32)
    greedy = temperature == 0
    chain = (
        rules.RepetitionPenaltyLogitsProcessor(column("repetition_penalty")),
        rules.FrequencyPenaltyLogitsProcessor(column("frequency_penalty")),
        rules.PresencePenaltyLogitsProcessor(column("presence_penalty")),
        rules.MinNewTokensLengthLogitsProcessor(column("min_new_tokens", np.int32)[:, 0], end_tokens),
        GreedyRows(greedy),
        warpers.TemperatureLogitsWarper(jnp.where(greedy, 1.0, temperature)),
        warpers.TopKLogitsWarper(jnp.where(top_k == 0, EVERY_TOKEN, top_k)),
        warpers.TopPLogitsWarper(column("top_p")),
        warpers.MinPLogitsWarper(column("min_p")),
    )
    return rules.LogitsProcessorList(chain)


def keys(options: Sequence[RowOptions]) -> Key[Array, " R"]:
    """A key for each row: that of the only row of a `generate` with its seed."""
    seeds = jnp.asarray(np.array([each.seed for each in options], np.uint32))
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds)
