"""Adds `generate` and its configuration to a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int, Num

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.generate import generate
from phi3_jax.generation.outputs import transition_scores


@dataclass(frozen=True, eq=False)
class Uncompiled:
    """Holds a value of a model that no computation depends on, so models that differ in it share programs.

    Whatever a module holds besides arrays is part of its program's key; all objects of this class are equal.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Uncompiled)

    def __hash__(self) -> int:
        return hash(Uncompiled)


class GenerationMixin:
    """Adds `generate` and its configuration to a causal language model."""

    _generation_config: Uncompiled

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of `generate`, from the checkpoint's generation_config.json."""
        return self._generation_config.value

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config = Uncompiled(value)

    def generate(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "B T"] | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """Continues each row of `input_ids`; names, defaults and results are those of transformers.

        Returns ids [B * num_return_sequences, T + new]: the prompt, new tokens, and `pad_token_id` after an
        end token; with `return_dict_in_generate`, an output of `phi3_jax.generation.outputs`.

        Args:
            input_ids: prompts, padded on either side; default: `bos_token_id` alone.
            attention_mask: 1 for tokens, 0 for padding; default: `pad_token_id` marks padding, unless it is
                also an end token.
            generation_config: overrides `self.generation_config`, which supplies the rest.
            options: any field of `GenerationConfig`, which overrides both configs, and the options below.

        Further options:
            inputs: another name of `input_ids`.
            inputs_embeds: prompts as embeddings [B, T, D], which `attention_mask` then belongs to. Without
                `input_ids` only the new tokens are returned, and logits processors see only these. With
                `input_ids` [B, up to T], they see and return these, and the model runs on the embeddings.
            past_key_values: the cache that an earlier call returned; `input_ids` still has all tokens.
            logits_processor: a list. A `LogitsProcessor` runs on the device; a function of NumPy arrays,
                (input_ids, scores) -> scores, runs on the host at every step, as in transformers.
            prefix_allowed_tokens_fn: (row, ids) -> allowed tokens, on the host;
                `AllowedTokensLogitsProcessor` does the same on the device.
            stopping_criteria: (input_ids, scores) -> bool or bools [rows], on the host.
            tokenizer: for `stop_strings`.
            assistant_model: a small model that drafts tokens; `prompt_lookup_num_tokens` needs none.
            negative_prompt_ids, negative_prompt_attention_mask: prompts that `guidance_scale` avoids.
            inv_freq: rope frequencies in place of the config's, [rotary_dim / 2], [B, rotary_dim / 2]
                or, for positions 0, 1, ..., [B, positions, rotary_dim / 2] (the last holds beyond them);
                `LayerFrequencies` for each layer or key/value head.
            attention_scaling: factor on cosine and sine in place of the config's, a number or [B].
            streamer: `put` gets the prompts, then every step's tokens, `end` comes last.
            seed: of the draws; default: another one for every call.

        Raises:
            UserError: settings contradict each other, or a prompt or argument does not fit.
            TypeError: there is no such argument.
        """
        return generate(CompiledModel(self), input_ids, attention_mask, generation_config, **options)

    def compute_transition_scores(
        self,
        sequences: Int[Array, "R length"],
        scores: Sequence[Float[Array, "beams V"]] | None,
        beam_indices: Int[Array, "R new"] | None = None,
        normalize_logits: bool = False,
    ) -> Float[Array, "R new"]:
        """Returns the score with which each new token was chosen; 0 after the end of a beam.

        Args:
            sequences, scores, beam_indices: of an output of `generate`; the last one only of beams.
            normalize_logits: turn the scores of each step into log-probabilities first; those of beams are.

        Raises:
            UserError: there are no scores, or those of beams come without their indices.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)
