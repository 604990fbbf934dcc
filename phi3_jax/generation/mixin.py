"""The methods that generation adds to a model."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Int, Num

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.generate import generate


@dataclass(frozen=True, eq=False)
class Aside:
    """Something a model carries that no computation depends on: models that differ in it are compiled once.

    What a module holds besides arrays is part of what it is compiled for; this is equal whatever it holds.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Aside)

    def __hash__(self) -> int:
        return hash(Aside)


class GenerationMixin:
    """Adds `generate` and its configuration to a causal language model."""

    _generation_config: Aside

    @property
    def generation_config(self) -> GenerationConfig:
        """What `generate` does unless told otherwise; from the checkpoint's generation_config.json."""
        return self._generation_config.value

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config = Aside(value)

    def generate(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Num[Array, "B T"] | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """Continues each row of `input_ids`; names, defaults and results are those of transformers.

        Returns ids [B * num_return_sequences, T + new]: the prompt, new tokens, `pad_token_id` behind an end
        token; or, with `return_dict_in_generate`, what `phi3_jax.generation.outputs` documents.

        Args:
            input_ids: prompts, padded on either side.
            attention_mask: 1 for tokens, 0 for padding; default: padding is told by `pad_token_id`, unless
                that is an end token too.
            generation_config: comes before `self.generation_config`, which fills what it leaves open.
            options: any field of `GenerationConfig`, which then counts before both configs, and
                past_key_values: the cache that an earlier call returned; `input_ids` still has all tokens.
                logits_processor: `LogitsProcessor`s, or transformers' kind (input_ids, scores) -> scores in
                    NumPy, which run on the host after every step.
                prefix_allowed_tokens_fn: (row, ids) -> allowed tokens, on the host likewise; its like on the
                    device is `AllowedTokensLogitsProcessor`.
                stopping_criteria: (input_ids, scores) -> bool or bools [rows], on the host.
                tokenizer: for `stop_strings`.
                assistant_model: a small model that drafts tokens; `prompt_lookup_num_tokens` drafts without.
                negative_prompt_ids, negative_prompt_attention_mask: what `guidance_scale` guides away from.
                inv_freq: rope frequencies in place of the config's, [rotary_dim / 2], [B, rotary_dim / 2]
                    or, for positions 0, 1, ..., [B, positions, rotary_dim / 2] (behind them, the last one's).
                attention_scaling: factor on cosine and sine in place of the config's, a number or [B].
                streamer: `put` gets the prompts, then every step's tokens, `end` comes last.
                seed: of the draws; default: another one for every call.

        Raises:
            ValueError: settings that contradict each other, prompts or arguments that do not fit.
            TypeError: an argument that there is not.
        """
        return generate(CompiledModel(self), input_ids, attention_mask, generation_config, **options)
