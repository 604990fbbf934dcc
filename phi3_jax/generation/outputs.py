"""The results of generate, under transformers' names, assembled from the records of the steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.errors import UserError
from phi3_jax.generation.engine import StepResult
from phi3_jax.generation.forward import Records
from phi3_jax.generation.prompts import PromptLayout
from phi3_jax.generation.state import NO_TOKEN


@dataclass(frozen=True)
class GenerateDecoderOnlyOutput:
    """The result of greedy search, sampling or assisted generation for R = B * num_return_sequences rows.

    A tuple has an entry for each new token; its values mean nothing in rows that have ended.
    """

    sequences: Int[Array, "R length"]
    scores: tuple[Float[Array, "R V"], ...] | None = None
    """Logits after the logits processors."""
    logits: tuple[Float[Array, "R V"], ...] | None = None
    attentions: tuple[tuple[Float[Array, "R N queries keys"], ...], ...] | None = None
    """For each new token, for each layer; the first entry is the prompt's, 0 at its padding."""
    hidden_states: tuple[tuple[Float[Array, "R queries D"], ...], ...] | None = None
    past_key_values: KVCache | None = None
    """Holds each row's tokens but the last; to continue, pass it with `sequences` and more tokens."""


@dataclass(frozen=True)
class GenerateBeamDecoderOnlyOutput:
    """The result of beam search for R = B * num_return_sequences rows; steps have B * num_beams beams."""

    sequences: Int[Array, "R length"]
    sequences_scores: Float[Array, " R"] | None = None
    scores: tuple[Float[Array, "beams V"], ...] | None = None
    """Log-probabilities of each step after the logits processors."""
    logits: tuple[Float[Array, "beams V"], ...] | None = None
    beam_indices: Int[Array, "R new"] | None = None
    """The running beam that each token came from; -1 after the end."""
    attentions: tuple[tuple[Float[Array, "beams N queries keys"], ...], ...] | None = None
    hidden_states: tuple[tuple[Float[Array, "beams queries D"], ...], ...] | None = None
    past_key_values: KVCache | None = None
    """The cache of the returned sequences."""


def transition_scores(
    sequences: Int[Array, "R length"],
    scores: Sequence[Float[Array, "beams V"]] | None,
    beam_indices: Int[Array, "R new"] | None = None,
    normalize_logits: bool = False,
) -> Float[Array, "R new"]:
    """Does what `Phi3ForCausalLM.compute_transition_scores` documents."""
    if not scores:
        raise UserError(
            "there are no scores; call generate with return_dict_in_generate=True and output_scores=True"
        )
    of_steps = np.stack([np.asarray(step) for step in scores])  # [steps, beams, V]
    if normalize_logits:
        of_steps = np.asarray(jax.nn.log_softmax(of_steps, axis=-1))
    ids = np.asarray(sequences)
    if beam_indices is not None:
        beams = np.asarray(beam_indices)
    elif len(ids) == of_steps.shape[1]:
        beams = np.broadcast_to(np.arange(len(ids))[:, None], (len(ids), len(of_steps)))
    else:
        raise UserError(
            f"{len(ids)} sequences come from scores of {of_steps.shape[1]} beams; give beam_indices, too"
        )
    is_token = beams >= 0
    count = int(is_token.sum(axis=1).max())
    beams, is_token = np.where(is_token, beams, 0)[:, :count], is_token[:, :count]
    picked = of_steps[np.arange(count), beams, ids[:, ids.shape[1] - count :]]
    return jnp.asarray(np.where(is_token, picked, np.float32(0)))


class Source(NamedTuple):
    """The dispatched step that computed a token, and the token's position in it."""

    step: int
    position: int


class Recorder:
    """Collects the records of the steps and returns them token by token.

    Args:
        layout: the slots of the prompts.
        prompts: the prompt in the layout that each row continues.
        mask: the user's mask of each row [R, T].
        prefill: the records of the prompts' chunks.
    """

    def __init__(
        self,
        layout: PromptLayout,
        prompts: Int[np.ndarray, " R"],
        mask: Bool[np.ndarray, "R T"],
        prefill: list[Records],
    ):
        self._layout, self._prompts, self._mask = layout, prompts, mask
        self._prefill = jax.device_get(prefill)
        self._tokens: list[np.ndarray] = []
        self._steps: list[Records] = []

    def add(self, result: StepResult) -> None:
        """Adds the records of one dispatch."""
        records = jax.device_get(result.records)
        for step, tokens in enumerate(result.tokens):
            self._tokens.append(tokens)
            self._steps.append(jax.tree.map(lambda x, step=step: x[step], records))

    def collect(self, outputs: frozenset[str], new: int | None = None) -> dict[str, Any]:
        """Returns for each output a tuple with an entry for each of the first `new` tokens (default: all)."""
        sources = self._sources()[:new]
        collected: dict[str, Any] = {
            name: tuple(jnp.asarray(self._stack(name, of_rows)) for of_rows in sources)
            for name in outputs & {"scores", "logits"}
        }
        if "hidden_states" in outputs:
            collected["hidden_states"] = self._per_layer("hidden_states", sources, self._hidden_state)
        if "attentions" in outputs:
            collected["attentions"] = self._per_layer("attentions", sources, self._attention)
        return collected

    def _stack(self, name: str, sources: list[Source]) -> np.ndarray:
        """Stacks the records of every row's source."""
        return np.stack(
            [self._steps[source.step][name][row, source.position] for row, source in enumerate(sources)]
        )

    def _sources(self) -> list[list[Source]]:
        """Returns each new token's source in every row; in a row without the token, another row's."""
        of_rows: list[list[Source]] = [[] for _ in self._prompts]
        for step, tokens in enumerate(self._tokens):
            for row, sources in enumerate(of_rows):
                sources += [Source(step, int(index)) for index in np.flatnonzero(tokens[row] != NO_TOKEN)]
        longest = max(of_rows, key=len)
        return [
            [sources[token] if token < len(sources) else longest[token] for sources in of_rows]
            for token in range(len(longest))
        ]

    def _per_layer(
        self, name: str, sources: list[list[Source]], record: Callable[[int, int, int, Source], np.ndarray]
    ) -> tuple[Any, ...]:
        """Returns for each new token a tuple over layers; the first token's is the prompt's."""
        layers = len(self._prefill[0][name])
        return tuple(
            tuple(
                jnp.asarray(
                    np.stack([record(layer, token, row, source) for row, source in enumerate(of_rows)])
                )
                for layer in range(layers)
            )
            for token, of_rows in enumerate(sources)
        )

    def _hidden_state(self, layer: int, token: int, row: int, source: Source) -> np.ndarray:
        if token:
            states = self._steps[source.step]["hidden_states"][layer][row]
            return states[source.position : source.position + 1]
        positions, records = self._prompt_records(row, "hidden_states", layer)
        out = np.zeros((self._mask.shape[1], records[0].shape[-1]), records[0].dtype)
        out[positions] = np.stack(records)
        return out[self._first_query :]

    def _attention(self, layer: int, token: int, row: int, source: Source) -> np.ndarray:
        slots = self._layout.slots[self._prompts[row]]
        prompt = np.flatnonzero(self._mask[row])
        width = self._mask.shape[1]
        if token:
            new_slots = self._layout.length[self._prompts[row]] + np.arange(token)
            weights = self._steps[source.step]["attentions"][layer][row][:, source.position]  # [N, S]
            out = np.zeros((weights.shape[0], 1, width + token), weights.dtype)
            keys = np.append(prompt, width + np.arange(token))
            out[:, 0, keys] = weights[:, np.append(slots, new_slots)]
            return out
        positions, weights_of = self._prompt_records(row, "attentions", layer)
        out = np.zeros((weights_of[0].shape[0], width, width), weights_of[0].dtype)
        for position, weights in zip(positions, weights_of, strict=True):
            out[:, position, prompt] = weights[:, slots]
        return out[:, self._first_query :]

    @property
    def _first_query(self) -> int:
        """The first index of the user's input that was not in some row's cache at the start."""
        firsts = []
        for row, prompt in enumerate(self._prompts):
            computed = self._layout.slots[prompt] >= self._layout.cached[prompt]
            firsts.append(np.flatnonzero(self._mask[row])[computed][0] if self._layout.cached[prompt] else 0)
        return int(min(firsts))

    def _prompt_records(self, row: int, name: str, layer: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the indices of a row's input that were computed, and the record of each."""
        prompt = self._prompts[row]
        slots = self._layout.slots[prompt]
        computed = slots >= self._layout.cached[prompt]
        record_of: dict[int, np.ndarray] = {}
        start, length = int(self._layout.cached[prompt]), int(self._layout.length[prompt])
        for chunk, records in enumerate(self._prefill):
            values = records[name][layer][prompt]
            values = values.swapaxes(0, 1) if name == "attentions" else values  # queries first
            last = chunk == len(self._prefill) - 1
            count = length - start if last else min(max(length - start - 1, 0), len(values))
            record_of |= {start + index: values[index] for index in range(count)}
            start += count
        return np.flatnonzero(self._mask[row])[computed], [record_of[slot] for slot in slots[computed]]
