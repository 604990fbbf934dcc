"""One call of generate, checked: prompts, settings for the steps, logits processors, criteria, caches."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.generation_config import GenerationConfig, ResolvedGeneration
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation.chain import logits_processors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.engine import DecodingEngine
from phi3_jax.generation.host import HostProcessors, PrefixConstraint, split_at_host
from phi3_jax.generation.memory import check_cache
from phi3_jax.generation.outputs import Recorder
from phi3_jax.generation.prompts import (
    PromptLayout,
    cache_length,
    check_embedded_prompts,
    check_frequencies,
    check_prompts,
    padded_rows,
    rectangle,
)
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, StepSettings
from phi3_jax.generation.stopping import (
    JoinedTokens,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from phi3_jax.parallel.distributed import from_primary_on
from phi3_jax.parallel.sharding import shards
from phi3_jax.sizes import INT32_MAX

STEPS = 16
"""The most tokens of a row in one dispatch."""
STEPS_BETWEEN_CRITERIA = 8
"""As STEPS, where the host judges every token: those after a row's last one are computed in vain."""
NO_TOKENS = np.zeros(0, np.int32)
OUTPUTS = ("scores", "logits", "attentions", "hidden_states")


class GenerationRequest:
    """One call of generate, checked; its arguments are those of `Phi3ForCausalLM.generate`."""

    def __init__(
        self,
        compiled: CompiledModel,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any] | None = None,
        assistant_model: CausalLM | None = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        seed: int | None = None,
        inv_freq: Any = None,
        attention_scaling: Any = None,
        step_by_step: bool = False,
        **overrides: Any,
    ):
        self.compiled, self.past, self.seed = compiled, past_key_values, seed
        self.assistant_model, self.streamer = assistant_model, streamer
        if inputs is not None and input_ids is not None:
            raise UserError("inputs is another name of input_ids; give one of them")
        ids = inputs if input_ids is None else input_ids
        ids = None if ids is None else rectangle("input_ids", ids)
        batch_size, length = _prompt_sizes(ids, inputs_embeds)
        self.config = _resolve(compiled.model, generation_config, overrides, batch_size, length)
        self._read_prompts(ids, inputs_embeds, attention_mask)
        self.batch = len(self.ids)
        self.copies = max(self.config.num_beams, self.config.num_return_sequences)
        """Rows that continue each prompt."""
        self.rows = self.batch * self.copies
        self.inv_freq, self.attention_scaling = check_frequencies(
            compiled.model.config, inv_freq, attention_scaling, self.batch
        )
        self.negative = self._negative_prompts(negative_prompt_ids, negative_prompt_attention_mask)
        self.before_host, host, self.after_host = split_at_host(
            self._logits_processors(logits_processor, prefix_allowed_tokens_fn)
        )
        self.on_host = HostProcessors(host, self.rows, self.full_ids) if host else None
        self.criteria = self._stopping_criteria(stopping_criteria, tokenizer)
        self.steps_per_dispatch = STEPS_BETWEEN_CRITERIA if self.criteria else STEPS
        if step_by_step or streamer is not None:
            self.steps_per_dispatch = 1
        self.outputs = frozenset(
            name
            for name in OUTPUTS
            if self.config.return_dict_in_generate and getattr(self.config, f"output_{name}")
        )
        self._check_together()

    def _read_prompts(self, ids: np.ndarray | None, embeds: Any, mask: Any) -> None:
        """Sets the prompts: the beginning of the answers, the mask, the tokens and embeddings of each row."""
        self._embeddings: list[np.ndarray] | None = None
        if embeds is not None:
            embedded = check_embedded_prompts(self.compiled.model.config, embeds, ids, mask)
            self.ids, self.mask, self._rows, self._embeddings = embedded
            return
        if ids is None:  # as in the reference
            if self.config.bos_token_id is None:
                raise UserError(
                    "without input_ids an answer begins with bos_token_id, and there is none; give one"
                )
            ids, mask = np.array([[self.config.bos_token_id]]), np.ones((1, 1)) if mask is None else mask
        self.ids, self.mask = self._check_prompts(ids, mask)
        self._rows = [row[used] for row, used in zip(self.ids, self.mask, strict=True)]

    def _check_prompts(self, ids: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        return check_prompts(self.compiled.model.config, ids, mask, config.pad_token_id, config.eos_token_ids)

    def _negative_prompts(self, ids: Any, mask: Any) -> list[np.ndarray] | None:
        """Returns each row's negative prompt, or None without any."""
        if ids is None:
            if mask is not None:
                raise UserError("negative_prompt_attention_mask comes without negative_prompt_ids")
            return None
        if not self.guided:
            raise UserError("negative_prompt_ids do nothing without guidance_scale (above 1, say)")
        ids, mask = self._check_prompts(ids, mask)
        if len(ids) not in (1, self.batch):
            raise UserError(
                f"negative_prompt_ids has {len(ids)} rows; expected one for each of {self.batch}, or 1"
            )
        rows = [row[used] for row, used in zip(ids, mask, strict=True)]
        return rows * self.batch if len(rows) == 1 else rows

    def _logits_processors(
        self, user: Sequence[Any] | None, allowed_tokens: Callable[[int, np.ndarray], Any] | None
    ) -> tuple[Any, ...]:
        own = list(user or ())
        if allowed_tokens is not None:
            own.append(PrefixConstraint(allowed_tokens, self.config.num_beams))
        return logits_processors(
            self.config,
            prompt_length=self.ids.shape[1],
            max_new_tokens=self.config.max_new_tokens,
            vocab_size=self.compiled.model.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            user=own,
        )

    def _stopping_criteria(self, user: Sequence[Any] | None, tokenizer: Any) -> StoppingCriteriaList:
        criteria = StoppingCriteriaList(user or ())
        if self.config.max_time is not None:
            criteria.append(MaxTimeCriteria(self.config.max_time))
        if self.config.stop_strings:
            if tokenizer is None:
                raise UserError("stop_strings need the tokenizer: give generate(..., tokenizer=tokenizer)")
            criteria.append(StopStringCriteria(tokenizer, self.config.stop_strings))
        return criteria

    def _check_together(self) -> None:
        """Rejects arguments that exclude each other or do not fit the model."""
        config, assistant, past = self.config, self.assistant_model, self.past
        vocabulary = self.compiled.model.config.vocab_size
        drafts = "drafts (assistant_model, prompt_lookup_num_tokens)"
        problem = None
        if assistant is not None and config.prompt_lookup_num_tokens is not None:
            problem = "assistant_model and prompt_lookup_num_tokens both draft tokens; give one of them"
        elif self.draft_tokens and config.num_beams > 1:
            problem = f"{drafts} and num_beams exclude each other"
        elif self.draft_tokens and self.guided:
            problem = f"{drafts} and guidance_scale exclude each other"
        elif self.draft_tokens and self.on_host is not None:
            problem = (
                f"{drafts} check several tokens at once, on the device: give logits_processor as "
                "LogitsProcessor, and AllowedTokensLogitsProcessor for prefix_allowed_tokens_fn"
            )
        elif past is not None and self.guided:
            problem = "guidance_scale cannot continue from past_key_values, which have no unconditional rows"
        elif self._embeddings is not None and (past is not None or assistant is not None or self.guided):
            given = (
                "past_key_values"
                if past is not None
                else "guidance_scale"
                if self.guided
                else "assistant_model"
            )
            problem = (
                f"{given} needs the ids of all tokens, and inputs_embeds have none; give input_ids alone"
            )
        elif past is not None and past.batch_size != self.batch:
            problem = f"past_key_values has {past.batch_size} rows and input_ids {self.batch}"
        elif self.streamer is not None and config.num_beams > 1:
            problem = "a streamer cannot follow beams, whose tokens still change; leave num_beams at 1"
        elif self.ring_cache and self.outputs & {"attentions"}:
            problem = "a sliding cache cannot return attentions: leave cache_implementation out"
        elif assistant is not None and assistant.config.vocab_size != vocabulary:
            problem = (
                f"assistant_model has a vocabulary of {assistant.config.vocab_size} tokens and this model "
                f"{vocabulary}; they must share a tokenizer"
            )
        elif assistant is not None and assistant.decoder.mesh != self.compiled.mesh:
            problem = "assistant_model lies on another mesh than this model; load both with the same mesh"
        elif self.criteria and self.rows > 1 and config.pad_token_id is None:
            problem = "the criteria may end rows at different lengths: give pad_token_id"
        if problem is not None:
            raise UserError(problem)

    @property
    def guided(self) -> bool:
        return self.config.guidance_scale not in (None, 1.0)

    @property
    def draft_tokens(self) -> int:
        """The number of tokens drafted at once; 0 without drafts."""
        if self.assistant_model is not None:
            return self.config.num_assistant_tokens
        return self.config.prompt_lookup_num_tokens or 0

    @property
    def ring_cache(self) -> bool:
        """Whether the cache is, or may be, a ring, whose size is fixed."""
        if self.past is not None:
            return self.past.window is not None
        return self.config.cache_implementation == "sliding_window"

    def _padding_rows(self, rows: int) -> list[Int[np.ndarray, " n"]]:
        """Returns the padding rows that bring `rows` to a size that is shared and that the mesh divides."""
        padded = padded_rows(rows, shards(self.compiled.model.decoder.mesh, "batch"))
        return [NO_TOKENS] * (padded - rows)

    def prompts(self, times: int = 1) -> list[Int[np.ndarray, " n"]]:
        """Returns the tokens of each prompt, `times` times."""
        return [row for row in self._rows for _ in range(times)]

    def engine(self, *, spare: int = 0, grows: bool = True) -> DecodingEngine:
        """Returns an engine with the prompts and their settings, then guidance's unconditional rows."""
        prompts, padding = self.prompts(), self._padding_rows(self.batch)
        rows = prompts + padding
        if self.guided:  # without a negative prompt the last token alone, as in the reference
            rows = rows + (self.negative or [row[-1:] for row in prompts]) + padding
        model = self.compiled.model
        tokens = max(map(len, rows)) + (1 if grows else self.config.max_new_tokens)
        check_cache(self.compiled, len(rows) * self.copies, cache_length(tokens), self.new_cache)
        return DecodingEngine(
            self.compiled,
            PromptLayout(rows, self.past),
            self.settings(model.config, rows, self._user_frequencies(len(rows))),
            max_new_tokens=self.config.max_new_tokens,
            new_cache=self.new_cache if self.past is None else partial(_cache_like, model, self.past),
            past=self.past,
            grows=grows and not self.ring_cache,
            outputs=self.outputs,
            on_host=self.on_host,
            spare=spare,
            embeddings=self._embeddings,
        )

    def assistant(self, engine: DecodingEngine) -> DecodingEngine:
        """Returns an engine of the assistant with the same rows."""
        assert self.assistant_model is not None
        rows = self.prompts() + [NO_TOKENS] * (len(engine.layout.ids) - self.batch)
        return DecodingEngine(
            CompiledModel(self.assistant_model),
            engine.layout.uncached(),
            self.settings(self.assistant_model.config, rows),
            max_new_tokens=self.config.max_new_tokens,
            new_cache=partial(self.assistant_model.init_cache, dtype=self.assistant_model.cache_dtype),
            grows=not self.ring_cache,
            spare=engine.spare,
        )

    def cache_of(self, rows: Sequence[Int[np.ndarray, " n"]]) -> KVCache:
        """Returns a new cache of `rows`, as many for each prompt, without the last token of each."""
        times, padding = len(rows) // self.batch, self._padding_rows(len(rows))
        planned = self.prompts(times) + padding  # their lengths choose planned rope lists
        frequencies = self._user_frequencies(len(planned), times, unconditional=False)
        settings = self.settings(self.compiled.model.config, planned, frequencies)
        engine = DecodingEngine(
            self.compiled,
            PromptLayout([*rows, *padding]),
            settings._replace(guidance_scale=None),
            max_new_tokens=1,
            new_cache=self.new_cache,
            grows=not self.ring_cache,
            embeddings=self._embeddings and [each for each in self._embeddings for _ in range(times)],
        )
        engine.fill_up()
        return engine.state.cache.take(jnp.arange(len(rows)))

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """Returns an empty cache of the kind that `cache_implementation` names."""
        kind = self.config.cache_implementation
        return self.compiled.model.init_cache(
            rows,
            slots,
            dtype="int8" if kind == "quantized" else self.compiled.model.cache_dtype,
            sliding=kind == "sliding_window",
        )

    def _user_frequencies(self, count: int, times: int = 1, unconditional: bool = True) -> dict[str, Any]:
        """Returns the user's frequencies for `count` rows, which hold each prompt `times` times.

        Padding rows are among them, and with `unconditional` and guidance the unconditional rows.
        """
        conditional = count // 2 if unconditional and self.guided else count
        prompts = np.minimum(np.arange(count) % conditional // times, self.batch - 1)
        user = {"inv_freq": self.inv_freq, "attention_scaling": self.attention_scaling}
        rows = jax.tree.map(lambda x: jnp.asarray(x[prompts]), user)
        return {name: x for name, x in rows.items() if x is not None}

    def settings(
        self,
        model_config: Phi3Config,
        rows: Sequence[Int[np.ndarray, " n"]],
        frequencies: Mapping[str, Any] = MappingProxyType({}),
    ) -> StepSettings:
        """Returns the settings of all steps for `rows`."""
        config = self.config
        key = None
        if config.do_sample:
            if self.seed is None:
                self.seed = from_primary_on(self.compiled.mesh, lambda: secrets.randbits(32))
            key = jax.random.key(np.uint32(index(self.seed) & 0xFFFFFFFF))  # as without 64-bit integers
        rope = _rope_choice(model_config, config.rope_list, rows, config.max_new_tokens)
        return StepSettings(
            before_host=self.before_host,
            after_host=self.after_host,
            end_tokens=jnp.asarray(config.eos_token_ids, jnp.int32),
            max_new_tokens=jnp.int32(config.max_new_tokens),
            rope=rope._replace(**frequencies),
            key=key,
            guidance_scale=jnp.float32(config.guidance_scale) if self.guided else None,
        )

    def full_ids(self, sequences: Sequences) -> Int[np.ndarray, "R length"]:
        """Returns the rows as transformers has them: the user's prompts, the new tokens, then padding."""
        ids, length, new = jax.device_get((sequences.ids, sequences.length, sequences.new))
        return self.with_prompts([ids[row, length[row] - new[row] : length[row]] for row in range(self.rows)])

    def with_prompts(self, new: Sequence[Any]) -> Int[np.ndarray, "R length"]:
        """Returns the user's prompts followed by new tokens, as many rows for each prompt, padded."""
        # Without a padding token no row can end before the others.
        padded = np.full((len(new), max(map(len, new))), self.config.pad_token_id or 0, np.int32)
        for row, tokens in enumerate(new):
            padded[row, : len(tokens)] = tokens
        return np.concatenate([np.repeat(self.ids, len(new) // self.batch, axis=0), padded], axis=1)

    def stopped(self, new: Sequence[Any]) -> Bool[np.ndarray, " R"]:
        """Returns which rows the criteria end after their new tokens; process 0 decides for all."""
        copies = len(new) // self.batch
        rows = [JoinedTokens(self.ids[row // copies], tokens) for row, tokens in enumerate(new)]
        return from_primary_on(
            self.compiled.mesh, lambda: self.criteria.stopped(rows, lambda: self.with_prompts(new))
        )

    def recorder(self, engine: DecodingEngine, origins: Int[np.ndarray, " B"]) -> Recorder:
        """Returns a recorder for the rows, which continue the engine's prompts `origins`."""
        origins = origins[: self.rows]
        return Recorder(engine.layout, origins, self.mask[origins], engine.prefill_records)


def _prompt_sizes(ids: np.ndarray | None, embeds: Any) -> tuple[int, int]:
    """Returns the batch size, and the length that limits on whole sequences count.

    Embeddings count as well as ids if their lengths differ, as in the reference.
    """
    shapes = [np.shape(x)[:2] for x in (ids, embeds) if x is not None]
    sizes = [shape for shape in shapes if len(shape) == 2] or [(1, 1)]  # others are refused later
    return sizes[0][0], sum({length for _, length in sizes})


def _resolve(
    model: CausalLM,
    config: GenerationConfig | None,
    overrides: Mapping[str, Any],
    batch_size: int,
    prompt_length: int,
) -> ResolvedGeneration:
    default = model.generation_config
    return (default if config is None else config).resolve(
        overrides,
        model_default=default,
        config=model.config,
        prompt_length=prompt_length,
        batch_size=batch_size,
    )


def _rope_choice(
    config: Phi3Config, rope_list: str, rows: Sequence[Int[np.ndarray, " n"]], max_new_tokens: int
) -> RopeChoice:
    """Returns the lengths that choose each row's frequencies under `rope_list`."""
    least, most = np.zeros(len(rows), np.int32), INT32_MAX
    switch = config.rope_scaling.switches_at(config.rope_base)
    if rope_list == "long" and switch is not None:
        least[:] = switch + 1
    elif rope_list == "short" and switch is not None:
        most = switch
    elif rope_list == "planned":
        least[:] = [len(row) + max_new_tokens for row in rows]
    return RopeChoice(jnp.asarray(least), jnp.int32(most))


def _cache_like(model: CausalLM, past: KVCache, rows: int, slots: int) -> KVCache:
    """Returns an empty cache of the same kind as `past`."""
    slots = slots if past.window is None else past.max_length
    dtype, mesh = past.keys[0].dtype, model.decoder.mesh
    return KVCache.create(model.config, rows, slots, dtype, past.window, mesh)
