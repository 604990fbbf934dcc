"""A call of generate, checked and made ready: prompts as lanes, settings, processors, criteria, cache."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation.chain import logits_processors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.engine import DecodingEngine
from phi3_jax.generation.host import HostProcessors, PrefixConstraint, split_at_host
from phi3_jax.generation.outputs import Recorder
from phi3_jax.generation.prompts import PromptLayout, checked_prompts, padded_rows
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, StepSettings
from phi3_jax.generation.stopping import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from phi3_jax.parallel.distributed import from_primary_on
from phi3_jax.parallel.sharding import shards

STEPS = 16
"""Tokens a row in one dispatch, at most."""
STEPS_BETWEEN_CRITERIA = 8
"""Tokens in one dispatch where the host judges each: those behind the last are computed in vain."""
NEVER = np.iinfo(np.int32).max
NONE = np.zeros(0, np.int32)


class GenerationRequest:
    """What a user asks of generate; arguments as `Phi3ForCausalLM.generate` documents them."""

    def __init__(
        self,
        compiled: CompiledModel,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
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
        model, config = compiled.model, compiled.model.config
        default = model.generation_config
        shape = np.shape(input_ids)
        self.config = chosen = (default if generation_config is None else generation_config).resolve(
            overrides,
            model_default=default,
            config=config,
            prompt_length=shape[1] if len(shape) == 2 else 1,
            batch_size=shape[0] if shape else 1,
        )
        self.compiled, self.past, self.seed = compiled, past_key_values, seed
        self.assistant_model, self.streamer = assistant_model, streamer
        self.ids, self.mask = self._checked(input_ids, attention_mask)
        self.batch = len(self.ids)
        self.times = max(chosen.num_beams, chosen.num_return_sequences)
        self.rows = self.batch * self.times
        self.inv_freq, self.attention_scaling = self._frequencies(inv_freq, attention_scaling)
        self.negative = self._negative_prompts(negative_prompt_ids, negative_prompt_attention_mask)

        user = list(logits_processor or ())
        if prefix_allowed_tokens_fn is not None:
            user.append(PrefixConstraint(prefix_allowed_tokens_fn, chosen.num_beams))
        processors = logits_processors(
            chosen,
            prompt_length=self.ids.shape[1],
            max_new_tokens=chosen.max_new_tokens,
            vocab_size=config.vocab_size,
            eos_token_ids=chosen.eos_token_ids,
            user=user,
        )
        self.before_host, host, self.after_host = split_at_host(processors)
        self.on_host = HostProcessors(host, self.rows, self.laid_out) if host else None
        self.criteria = StoppingCriteriaList(stopping_criteria or ())
        if chosen.max_time is not None:
            self.criteria.append(MaxTimeCriteria(chosen.max_time))
        if chosen.stop_strings:
            if tokenizer is None:
                raise UserError("stop_strings need the tokenizer: give generate(..., tokenizer=tokenizer)")
            self.criteria.append(StopStringCriteria(tokenizer, chosen.stop_strings))
        self.each = 1 if step_by_step or streamer is not None else STEPS
        if self.criteria:
            self.each = min(self.each, STEPS_BETWEEN_CRITERIA)
        names = ("scores", "logits", "attentions", "hidden_states")
        wanted = chosen.return_dict_in_generate
        self.outputs = frozenset(name for name in names if wanted and getattr(chosen, f"output_{name}"))
        self._check_together()

    def _checked(self, ids: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.config
        return checked_prompts(
            self.compiled.model.config, ids, mask, chosen.pad_token_id, chosen.eos_token_ids
        )

    def _frequencies(self, inv_freq: Any, scaling: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What the user gives in place of the config's, for each row."""
        half, batch = self.compiled.model.config.rotary_dim // 2, self.batch
        if inv_freq is not None:
            inv_freq = np.asarray(inv_freq, np.float32)
            fits = inv_freq.ndim in (1, 2, 3) and inv_freq.shape[-1] == half
            if not fits or (inv_freq.ndim > 1 and inv_freq.shape[0] not in (1, batch)):
                raise UserError(
                    f"inv_freq has shape {list(inv_freq.shape)}; expected [{half}], [{batch}, {half}] or, "
                    f"by position, [{batch}, positions, {half}]"
                )
            inv_freq = np.atleast_2d(inv_freq)
            inv_freq = np.broadcast_to(inv_freq, (batch, *inv_freq.shape[1:]))
        if scaling is not None:
            scaling = np.asarray(scaling, np.float32)
            if scaling.shape not in ((), (1,), (batch,)):
                raise UserError(
                    f"attention_scaling has shape {list(scaling.shape)}; expected a number or [{batch}]"
                )
            scaling = np.broadcast_to(scaling, (batch,))
        return inv_freq, scaling

    def _negative_prompts(self, ids: Any, mask: Any) -> list[np.ndarray] | None:
        """Each row's unconditional prompt, if there are any."""
        if ids is None:
            if mask is not None:
                raise UserError("negative_prompt_attention_mask comes without negative_prompt_ids")
            return None
        if not self.guided:
            raise UserError("negative_prompt_ids do nothing without guidance_scale (above 1, say)")
        ids, mask = self._checked(ids, mask)
        if len(ids) not in (1, self.batch):
            raise UserError(
                f"negative_prompt_ids has {len(ids)} rows; expected one for each of {self.batch}, or 1"
            )
        rows = [row[used] for row, used in zip(ids, mask, strict=True)]
        return rows * self.batch if len(rows) == 1 else rows

    def _check_together(self) -> None:
        """Arguments that exclude each other, or do not fit the model."""
        chosen, assistant, past = self.config, self.assistant_model, self.past
        vocabulary = self.compiled.model.config.vocab_size
        drafts = "drafts (assistant_model, prompt_lookup_num_tokens)"
        problem = None
        if assistant is not None and chosen.prompt_lookup_num_tokens is not None:
            problem = "assistant_model and prompt_lookup_num_tokens both draft tokens; give one of them"
        elif self.drafted and chosen.num_beams > 1:
            problem = f"{drafts} and num_beams exclude each other"
        elif self.drafted and self.guided:
            problem = f"{drafts} and guidance_scale exclude each other"
        elif self.drafted and self.on_host is not None:
            problem = (
                f"{drafts} check several tokens at once, on the device: give logits_processor as "
                "LogitsProcessor, and AllowedTokensLogitsProcessor for prefix_allowed_tokens_fn"
            )
        elif past is not None and self.guided:
            problem = "guidance_scale cannot go on from past_key_values, which have no unconditional side"
        elif past is not None and past.batch_size != self.batch:
            problem = f"past_key_values has {past.batch_size} rows and input_ids {self.batch}"
        elif self.streamer is not None and chosen.num_beams > 1:
            problem = "a streamer cannot follow beams, which change their minds; leave num_beams at 1"
        elif self.slides and self.outputs & {"attentions"}:
            problem = "a sliding cache has no attentions to give: leave cache_implementation out"
        elif assistant is not None and assistant.config.vocab_size != vocabulary:
            problem = (
                f"assistant_model has a vocabulary of {assistant.config.vocab_size} tokens and this model "
                f"{vocabulary}; they must share a tokenizer"
            )
        elif assistant is not None and assistant.decoder.mesh != self.compiled.mesh:
            problem = "assistant_model lies on another mesh than this model; load both with the same mesh"
        elif self.criteria and self.rows > 1 and chosen.pad_token_id is None:
            problem = "the criteria may end rows at different lengths: give pad_token_id"
        if problem is not None:
            raise UserError(problem)

    @property
    def guided(self) -> bool:
        return self.config.guidance_scale not in (None, 1.0)

    @property
    def drafted(self) -> int:
        """Tokens drafted at once; 0 where none are."""
        if self.assistant_model is not None:
            return self.config.num_assistant_tokens
        return self.config.prompt_lookup_num_tokens or 0

    @property
    def slides(self) -> bool:
        """Whether the cache is, or may be, a ring, whose size is fixed."""
        if self.past is not None:
            return self.past.window is not None
        return self.config.cache_implementation == "sliding_window"

    def _lanes(self, rows: int) -> int:
        """Lanes for so many rows: a size that is compiled anyway, and that a mesh divides."""
        return padded_rows(rows, shards(self.compiled.model.decoder.mesh, "batch"))

    def prompts(self, times: int = 1) -> list[Int[np.ndarray, " n"]]:
        """Each row's tokens, `times` times."""
        return [row[used] for row, used in zip(self.ids, self.mask, strict=True) for _ in range(times)]

    def engine(self, *, spare: int = 0, grows: bool = True) -> DecodingEngine:
        """The batch as lanes, guidance's twins behind the rows, with the settings for them."""
        rows = self.prompts()
        dummies = [NONE] * (self._lanes(self.batch) - self.batch)
        lanes = rows + dummies
        if self.guided:  # the last token alone where nothing else is said, as in the reference
            lanes = lanes + (self.negative or [row[-1:] for row in rows]) + dummies
        model = self.compiled.model
        return DecodingEngine(
            self.compiled,
            PromptLayout(lanes, self.past),
            self.settings(model.config, lanes, self._own_frequencies(len(lanes))),
            max_new_tokens=self.config.max_new_tokens,
            new_cache=self.new_cache if self.past is None else partial(_cache_like, model, self.past),
            past=self.past,
            grows=grows and not self.slides,
            outputs=self.outputs,
            on_host=self.on_host,
            spare=spare,
        )

    def assistant(self, engine: DecodingEngine) -> DecodingEngine:
        """The assistant with the same lanes."""
        assert self.assistant_model is not None
        lanes = self.prompts() + [NONE] * (len(engine.layout.ids) - self.batch)
        return DecodingEngine(
            CompiledModel(self.assistant_model),
            engine.layout.uncached(),
            self.settings(self.assistant_model.config, lanes),
            max_new_tokens=self.config.max_new_tokens,
            new_cache=self.assistant_model.init_cache,
            grows=not self.slides,
            spare=engine.spare,
        )

    def cache_of(self, rows: Sequence[Int[np.ndarray, " n"]]) -> KVCache:
        """A new cache of `rows`, but for the last token of each; as many for each prompt."""
        dummies = [NONE] * (self._lanes(len(rows)) - len(rows))
        prompts = self.prompts(len(rows) // self.batch)  # whose lengths choose planned rope lists
        engine = DecodingEngine(
            self.compiled,
            PromptLayout([*rows, *dummies]),
            self.settings(
                self.compiled.model.config,
                prompts + dummies,
                self._own_frequencies(len(rows) + len(dummies), len(rows) // self.batch, twins=False),
            )._replace(guidance_scale=None),
            max_new_tokens=1,
            new_cache=self.new_cache,
            grows=not self.slides,
        )
        engine.fill_up()
        return engine.state.cache.take(jnp.arange(len(rows)))

    def new_cache(self, lanes: int, columns: int) -> KVCache:
        """An empty cache of the kind that `cache_implementation` names."""
        kind = self.config.cache_implementation
        return self.compiled.model.init_cache(
            lanes,
            columns,
            dtype="int8" if kind == "quantized" else None,
            sliding=kind == "sliding_window",
        )

    def _own_frequencies(self, lanes: int, times: int = 1, twins: bool = True) -> dict[str, Any]:
        """Those that the user gave, for lanes that have each row `times` times, and dummies and twins."""
        lanes_of_rows = lanes // 2 if twins and self.guided else lanes
        rows = np.minimum(np.arange(lanes) % lanes_of_rows // times, self.batch - 1)
        given = {"inv_freq": self.inv_freq, "attention_scaling": self.attention_scaling}
        return {name: jnp.asarray(x[rows]) for name, x in given.items() if x is not None}

    def settings(
        self,
        model_config: Phi3Config,
        lanes: Sequence[Int[np.ndarray, " n"]],
        frequencies: Mapping[str, Any] = MappingProxyType({}),
    ) -> StepSettings:
        chosen = self.config
        key = None
        if chosen.do_sample:
            if self.seed is None:
                self.seed = from_primary_on(self.compiled.mesh, lambda: secrets.randbits(32))
            key = jax.random.key(self.seed)
        return StepSettings(
            before_host=self.before_host,
            after_host=self.after_host,
            end_tokens=jnp.asarray(chosen.eos_token_ids, jnp.int32),
            max_new_tokens=jnp.int32(chosen.max_new_tokens),
            rope=_rope_choice(model_config, chosen.rope_list, lanes, chosen.max_new_tokens)._replace(
                **frequencies
            ),
            key=key,
            guidance_scale=jnp.float32(chosen.guidance_scale) if self.guided else None,
        )

    def laid_out(self, sequences: Sequences) -> Int[np.ndarray, "R length"]:
        """The rows as transformers lays them: the user's prompts, then the new tokens, then padding."""
        ids, length, new = jax.device_get((sequences.ids, sequences.length, sequences.new))
        return self.with_prompts([ids[row, length[row] - new[row] : length[row]] for row in range(self.rows)])

    def with_prompts(self, tails: Sequence[Any]) -> Int[np.ndarray, "R length"]:
        """The user's prompts with new tokens behind, as many tails for each prompt, padded."""
        # Without a padding token nothing can end a row before the others.
        behind = np.full((len(tails), max(map(len, tails))), self.config.pad_token_id or 0, np.int32)
        for row, tail in enumerate(tails):
            behind[row, : len(tail)] = tail
        return np.concatenate([np.repeat(self.ids, len(tails) // self.batch, axis=0), behind], axis=1)

    def stopped(self, tails: Sequence[Any]) -> Bool[np.ndarray, " R"]:
        """Which rows the host's criteria end, given their new tokens; asked in process 0 only."""
        return from_primary_on(self.compiled.mesh, lambda: self.criteria(self.with_prompts(tails), None))

    def recorder(self, engine: DecodingEngine, origins: Int[np.ndarray, " L"]) -> Recorder:
        lanes = origins[: self.rows]
        return Recorder(engine.layout, lanes, self.mask[lanes], engine.prefill_records)


def _rope_choice(
    config: Phi3Config, rope_list: str, lanes: Sequence[Int[np.ndarray, " n"]], max_new_tokens: int
) -> RopeChoice:
    """What `rope_list` asks for."""
    least = np.zeros(len(lanes), np.int32)
    most = NEVER
    if rope_list == "long":
        least[:] = config.original_max_position_embeddings + 1
    elif rope_list == "short":
        most = 1
    elif rope_list == "planned":
        least[:] = [len(row) + max_new_tokens for row in lanes]
    return RopeChoice(jnp.asarray(least), jnp.int32(most))


def _cache_like(model: CausalLM, past: KVCache, lanes: int, columns: int) -> KVCache:
    """An empty cache of the kind that `past` is."""
    slots = columns if past.window is None else past.max_length
    dtype, mesh = past.keys[0].dtype, model.decoder.mesh
    return KVCache.create(model.config, lanes, slots, dtype, past.window, mesh)
