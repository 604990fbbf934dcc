"""What generate returns, under transformers' names, put together from what the steps recorded."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation.engine import GeneratedTokens
from phi3_jax.generation.forward import Records
from phi3_jax.generation.prompts import PromptLayout
from phi3_jax.generation.state import NO_TOKEN


@dataclass(frozen=True)
class GenerateDecoderOnlyOutput:
    """Of greedy search, sampling and assisted generation; R rows are B * num_return_sequences.

    A tuple has an entry for each new token; in rows that have ended its values mean nothing.
    """

    sequences: Int[Array, "R length"]
    scores: tuple[Float[Array, "R V"], ...] | None = None
    """Logits after the logits processors."""
    logits: tuple[Float[Array, "R V"], ...] | None = None
    attentions: tuple[tuple[Float[Array, "R N queries keys"], ...], ...] | None = None
    """For each new token, for each layer; the first entry is of the prompt, 0 at its padding."""
    hidden_states: tuple[tuple[Float[Array, "R queries D"], ...], ...] | None = None
    past_key_values: KVCache | None = None
    """Holds each row's tokens but the last; hand it back with `sequences` and more tokens to go on."""


@dataclass(frozen=True)
class GenerateBeamDecoderOnlyOutput:
    """Of beam search; R rows are B * num_return_sequences, steps have B * num_beams."""

    sequences: Int[Array, "R length"]
    sequences_scores: Float[Array, " R"] | None = None
    scores: tuple[Float[Array, "beams V"], ...] | None = None
    """Log-probabilities of each step after the logits processors."""
    logits: tuple[Float[Array, "beams V"], ...] | None = None
    beam_indices: Int[Array, "R new"] | None = None
    """The running beam that each token came from; -1 behind the end."""
    attentions: tuple[tuple[Float[Array, "beams N queries keys"], ...], ...] | None = None
    hidden_states: tuple[tuple[Float[Array, "beams queries D"], ...], ...] | None = None
    past_key_values: KVCache | None = None
    """Of the returned sequences."""


class Recorder:
    """Collects what the steps recorded and gives it out token by token.

    Args:
        layout: where the prompts stand.
        lanes: the lane of the layout that each row's prompt has.
        mask: the user's mask of each row [R, T].
        prefill: the records of the prompts' chunks.
    """

    def __init__(
        self,
        layout: PromptLayout,
        lanes: Int[np.ndarray, " R"],
        mask: Bool[np.ndarray, "R T"],
        prefill: list[Records],
    ):
        self._layout, self._lanes, self._mask = layout, lanes, mask
        self._prefill = jax.device_get(prefill)
        self._tokens: list[np.ndarray] = []
        self._steps: list[Records] = []

    def add(self, made: GeneratedTokens) -> None:
        """One dispatch's."""
        records = jax.device_get(made.records)
        for step, tokens in enumerate(made.tokens):
            self._tokens.append(tokens)
            self._steps.append(jax.tree.map(lambda x, step=step: x[step], records))

    def collect(self, outputs: frozenset[str], new: int | None = None) -> dict[str, Any]:
        """A tuple with an entry for each of the first `new` tokens (default: all) for each output."""
        places = self._places()[:new]
        collected: dict[str, Any] = {
            name: tuple(jnp.asarray(self._stacked(name, place)) for place in places)
            for name in outputs & {"scores", "logits"}
        }
        if "hidden_states" in outputs:
            collected["hidden_states"] = self._per_layer("hidden_states", places, self._hidden_state)
        if "attentions" in outputs:
            collected["attentions"] = self._per_layer("attentions", places, self._attention)
        return collected

    def _stacked(self, name: str, where: list[tuple[int, int]]) -> np.ndarray:
        """What every row has at its step and place."""
        return np.stack([self._steps[step][name][row, at] for row, (step, at) in enumerate(where)])

    def _places(self) -> list[list[tuple[int, int]]]:
        """Each new token's step and place in it, in every row; in a row without the token, another row's."""
        rows: list[list[tuple[int, int]]] = [[] for _ in self._lanes]
        for step, tokens in enumerate(self._tokens):
            for row, places in enumerate(rows):
                places += [(step, int(at)) for at in np.flatnonzero(tokens[row] != NO_TOKEN)]
        longest = max(rows, key=len)
        return [
            [places[token] if token < len(places) else longest[token] for places in rows]
            for token in range(len(longest))
        ]

    def _per_layer(self, name: str, places: list[list[tuple[int, int]]], one: Any) -> tuple[Any, ...]:
        """For each new token a tuple over layers, the first being the prompt's."""
        layers = len(self._prefill[0][name])
        return tuple(
            tuple(
                jnp.asarray(np.stack([one(layer, token, row, *place) for row, place in enumerate(where)]))
                for layer in range(layers)
            )
            for token, where in enumerate(places)
        )

    def _hidden_state(self, layer: int, token: int, row: int, step: int, at: int) -> np.ndarray:
        if token:
            return self._steps[step]["hidden_states"][layer][row, at : at + 1]
        columns, found = self._prompt(row, "hidden_states", layer)
        out = np.zeros((self._mask.shape[1], found[0].shape[-1]), found[0].dtype)
        out[columns] = np.stack(found)
        return out[self._first_query :]

    def _attention(self, layer: int, token: int, row: int, step: int, at: int) -> np.ndarray:
        slots = self._layout.columns[self._lanes[row]]
        prompt = np.flatnonzero(self._mask[row])
        if token:
            behind = self._layout.length[self._lanes[row]] + np.arange(token)
            seen = self._steps[step]["attentions"][layer][row][:, at]  # [N, S]
            out = np.zeros((seen.shape[0], 1, self._mask.shape[1] + token), seen.dtype)
            columns = np.append(prompt, self._mask.shape[1] + np.arange(token))
            out[:, 0, columns] = seen[:, np.append(slots, behind)]
            return out
        columns, found = self._prompt(row, "attentions", layer)
        width = self._mask.shape[1]
        out = np.zeros((found[0].shape[0], width, width), found[0].dtype)
        for column, weights in zip(columns, found, strict=True):
            out[:, column, prompt] = weights[:, slots]
        return out[:, self._first_query :]

    @property
    def _first_query(self) -> int:
        """The first of the user's columns that some row's cache did not hold at the start."""
        firsts = []
        for row, lane in enumerate(self._lanes):
            fed = self._layout.columns[lane] >= self._layout.cached[lane]
            firsts.append(np.flatnonzero(self._mask[row])[fed][0] if self._layout.cached[lane] else 0)
        return int(min(firsts))

    def _prompt(self, row: int, name: str, layer: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The user's columns of a row's prompt that were computed, and what was recorded at each."""
        lane = self._lanes[row]
        slots = self._layout.columns[lane]
        computed = slots >= self._layout.cached[lane]
        found: dict[int, np.ndarray] = {}
        start, length = int(self._layout.cached[lane]), int(self._layout.length[lane])
        for chunk, records in enumerate(self._prefill):
            of_lane = records[name][layer][lane]
            of_lane = of_lane.swapaxes(0, 1) if name == "attentions" else of_lane  # queries first
            last = chunk == len(self._prefill) - 1
            count = length - start if last else min(max(length - start - 1, 0), len(of_lane))
            found |= {start + at: of_lane[at] for at in range(count)}
            start += count
        return np.flatnonzero(self._mask[row])[computed], [found[slot] for slot in slots[computed]]
