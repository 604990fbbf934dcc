"""`generate`: a user's call checked and laid out, the right loop run, its answer put together."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.generation import beam
from phi3_jax.generation.chain import logits_processors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation_config import GenerationConfig
from phi3_jax.generation.engine import Dispatch, Engine, Made
from phi3_jax.generation.forward import Records, apply_all
from phi3_jax.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, Recorder
from phi3_jax.generation.processors import LogitsProcessor
from phi3_jax.generation.prompts import Layout, checked_prompts, padded_rows
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.speculative import Pair, assisted_loop, lookup_loop
from phi3_jax.generation.state import NO_TOKEN, Settings
from phi3_jax.generation.stopping import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from phi3_jax.model import KVCache

STEPS = 16
"""Tokens a row in one dispatch, at most."""
STEPS_BETWEEN_CRITERIA = 8
"""Tokens in one dispatch where the host judges each: those behind the last are computed in vain."""
NEVER = np.iinfo(np.int32).max

_start = jax.jit(beam.start, static_argnums=(1, 2))
_beam_scores = jax.jit(beam.beam_scores)
_apply_all = jax.jit(apply_all)
_propose = jax.jit(beam.propose, static_argnums=3)
_ends = jax.jit(beam.ends)
_extended = jax.jit(beam.extended)
_advance = jax.jit(beam.advance, static_argnums=5, donate_argnums=0)


def generate(compiled: CompiledModel, input_ids: Any, *arguments: Any, **keywords: Any) -> Any:
    """What `Phi3ForCausalLM.generate` documents, for a model that is taken apart already."""
    call = Call(compiled, input_ids, *arguments, **keywords)
    for _ in call.run():
        pass
    return call.result()


class Call:
    """One call of generate: `run` makes the tokens, after which `result` has what the user gets."""

    def __init__(
        self,
        compiled: CompiledModel,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        past_key_values: KVCache | None = None,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any] | None = None,
        assistant_model: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        seed: int | None = None,
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
        ends = chosen.eos_token_ids
        self.compiled, self.past, self.seed = compiled, past_key_values, seed
        self.ids, self.mask = checked_prompts(config, input_ids, attention_mask, chosen.pad_token_id, ends)
        self.assistant_model, self.streamer = assistant_model, streamer
        self.batch = len(self.ids)
        self.times = max(chosen.num_beams, chosen.num_return_sequences)
        self.rows = self.batch * self.times
        self.negative = self._negative_prompts(negative_prompt_ids, negative_prompt_attention_mask)
        self._check_mode()

        user = list(logits_processor)
        if prefix_allowed_tokens_fn is not None:
            user.append(PrefixConstraint(prefix_allowed_tokens_fn, chosen.num_beams))
        self.processors = logits_processors(
            chosen,
            prompt_length=self.ids.shape[1],
            max_new_tokens=chosen.max_new_tokens,
            vocab_size=config.vocab_size,
            eos_token_ids=ends,
            user=user,
        )
        self.criteria = StoppingCriteriaList(stopping_criteria)
        if chosen.max_time is not None:
            self.criteria.append(MaxTimeCriteria(chosen.max_time))
        if chosen.stop_strings:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: give generate(..., tokenizer=tokenizer)")
            self.criteria.append(StopStringCriteria(tokenizer, chosen.stop_strings))
        self.each = 1 if step_by_step or streamer is not None else STEPS
        if self.criteria:
            self.each = min(self.each, STEPS_BETWEEN_CRITERIA)
        flags = ("scores", "logits", "attentions", "hidden_states")
        wanted = chosen.return_dict_in_generate
        self.outputs = frozenset(name for name in flags if wanted and getattr(chosen, f"output_{name}"))
        self.tokens: list[list[int]] = [[] for _ in range(self.rows)]

    def _check_mode(self) -> None:
        chosen, config = self.config, self.compiled.model.config
        assisted = self.assistant_model is not None or chosen.prompt_lookup_num_tokens is not None
        problem = None
        if self.assistant_model is not None and chosen.prompt_lookup_num_tokens is not None:
            problem = "assistant_model and prompt_lookup_num_tokens both draft tokens; give one of them"
        elif assisted and chosen.num_beams > 1:
            problem = "drafts (assistant_model, prompt_lookup_num_tokens) and num_beams exclude each other"
        elif assisted and self.guided:
            problem = (
                "drafts (assistant_model, prompt_lookup_num_tokens) and guidance_scale exclude each other"
            )
        elif self.past is not None and self.guided:
            problem = "guidance_scale cannot go on from past_key_values, which have no unconditional side"
        elif self.past is not None and self.past.batch_size != self.batch:
            problem = f"past_key_values has {self.past.batch_size} rows and input_ids {self.batch}"
        elif self.negative is not None and not self.guided:
            problem = "negative_prompt_ids do nothing without guidance_scale (above 1, say)"
        elif self.streamer is not None and chosen.num_beams > 1:
            problem = "a streamer cannot follow beams, which change their minds; leave num_beams at 1"
        elif self.assistant_model is not None and (
            self.assistant_model.config.vocab_size != config.vocab_size
        ):
            problem = (
                f"assistant_model has a vocabulary of {self.assistant_model.config.vocab_size} tokens and this "
                f"model one of {config.vocab_size}; they must share a tokenizer"
            )
        if problem is not None:
            raise ValueError(problem)

    @property
    def guided(self) -> bool:
        return self.config.guidance_scale not in (None, 1.0)

    def _negative_prompts(self, ids: Any, mask: Any) -> list[np.ndarray] | None:
        """Each row's unconditional prompt; the last token of its own where none is given."""
        if ids is None:
            if mask is not None:
                raise ValueError(
                    "negative_prompt_attention_mask comes with negative_prompt_ids, which are missing"
                )
            return None
        chosen = self.config
        checked, mask = checked_prompts(
            self.compiled.model.config, ids, mask, chosen.pad_token_id, chosen.eos_token_ids
        )
        if len(checked) not in (1, self.batch):
            raise ValueError(
                f"negative_prompt_ids has {len(checked)} rows; expected one for each of {self.batch}, or 1"
            )
        rows = [row[used] for row, used in zip(checked, mask, strict=True)]
        return rows * self.batch if len(rows) == 1 else rows

    def run(self) -> Iterator[Int[np.ndarray, " R"]]:
        """Makes the tokens; gives each step's as they come, NO_TOKEN in rows without one."""
        if self.streamer is not None:
            self.streamer.put(np.repeat(self.ids, self.times, axis=0))
        if self.config.num_beams > 1:
            self._beams()
        else:
            yield from self._one_by_one()
        if self.streamer is not None:
            self.streamer.end()

    # --- what every mode needs -----------------------------------------------------------------------------

    def engine(self, compiled: CompiledModel, *, spare: int = 0, grows: bool = True) -> Engine:
        """The batch as lanes of `compiled`, with settings; an assistant's has neither past nor records."""
        lanes = padded_rows(self.batch)
        rows = [row[used] for row, used in zip(self.ids, self.mask, strict=True)]
        dummies = [np.zeros(0, np.int32)] * (lanes - self.batch)
        of_lanes = rows + dummies
        if self.guided:
            of_lanes = of_lanes + (self.negative or [row[-1:] for row in rows]) + dummies
        layout = Layout(of_lanes, self.past)
        config = compiled.model.config
        new_cache = partial(new_cache_of, compiled.model, self.config.cache_implementation)
        past = self.past
        if compiled is not self.compiled:
            layout, past = layout.uncached(), None
        if past is not None:
            new_cache = partial(cache_like, config, past)
        before, self.host_processors, after = split_at_host(self.processors)
        return Engine(
            compiled,
            layout,
            self.settings(config, of_lanes, before, after),
            max_new_tokens=self.config.max_new_tokens,
            new_cache=new_cache,
            past=past,
            grows=grows and not self.slides,
            outputs=self.outputs if compiled is self.compiled else frozenset(),
            on_host=self.on_host if self.host_processors else None,
            spare=spare,
        )

    @property
    def slides(self) -> bool:
        """Whether the cache is, or may be, a ring, whose size is fixed."""
        if self.past is not None:
            return self.past.window is not None
        return self.config.cache_implementation == "sliding_window"

    def settings(self, model_config: Any, lane_rows: Sequence[Any], before: Any, after: Any) -> Settings:
        chosen = self.config
        least, most = rope_bounds(model_config, chosen.rope_list, lane_rows, chosen.max_new_tokens)
        key = None
        if chosen.do_sample:
            key = jax.random.key(secrets.randbits(32) if self.seed is None else self.seed)
        return Settings(
            before=before,
            after=after,
            end_tokens=jnp.asarray(chosen.eos_token_ids, jnp.int32),
            max_new_tokens=jnp.int32(chosen.max_new_tokens),
            rope_least=least,
            rope_most=most,
            key=key,
            guidance_scale=jnp.float32(chosen.guidance_scale) if self.guided else None,
        )

    def on_host(self, sequences: Sequences, scores: Any) -> Any:
        """The processors that run on the host, and those between them."""
        ids = self.laid_out(sequences)
        for processor in self.host_processors:
            if isinstance(processor, LogitsProcessor):
                scores = processor(rows_of(sequences, len(scores)), jnp.asarray(scores))
                continue
            own = np.array(scores)
            answer = np.asarray(processor(ids, own[: self.rows].copy()), np.float32)
            if answer.shape != own[: self.rows].shape:
                raise ValueError(
                    f"logits processor {getattr(processor, '__name__', type(processor).__name__)} gave scores of "
                    f"shape {answer.shape}; expected {own[: self.rows].shape}"
                )
            own[: self.rows] = answer
            scores = own
        return scores

    def laid_out(self, sequences: Sequences) -> Int[np.ndarray, "R length"]:
        """The rows as transformers lays them: the user's prompts, then the new tokens, then padding."""
        ids, length, new = jax.device_get((sequences.ids, sequences.length, sequences.new))
        tails = [ids[row, length[row] - new[row] : length[row]] for row in range(self.rows)]
        return self.with_prompts(tails)

    def with_prompts(self, tails: Sequence[Any]) -> Int[np.ndarray, "R length"]:
        """The user's prompts with each row's new tokens behind, padded."""
        width = max(map(len, tails))
        # Without a padding token all rows are of one length: there is nothing that could end one.
        behind = np.full((len(tails), width), self.config.pad_token_id or 0, np.int32)
        for row, tail in enumerate(tails):
            behind[row, : len(tail)] = tail
        return np.concatenate([np.repeat(self.ids, len(tails) // self.batch, axis=0), behind], axis=1)

    # --- greedy search, sampling, drafts --------------------------------------------------------------------

    def _one_by_one(self) -> Iterator[Int[np.ndarray, " R"]]:
        most = self._drafted
        engine = self.engine(self.compiled, spare=most + 1 if most else 0)
        logits = engine.prefill()
        origins = engine.repeat(self.times)
        self._record(engine, origins)
        self.stopped = np.zeros(self.rows, bool)
        yield from self._accept(engine, engine.choose(logits[origins], {}))
        if engine.on_host is not None:
            dispatches = engine.steps_with_host()
        elif self.assistant_model is not None:
            dispatches = self._with_assistant(engine, origins)
        else:
            dispatches = engine.steps(self._dispatch(engine), ahead=not self.criteria)
        try:
            for made in dispatches:
                yield from self._accept(engine, made)
        finally:  # a reader may lose interest, and go on from here all the same
            self._keep_cache(engine, origins)

    def _keep_cache(self, engine: Engine, origins: Int[np.ndarray, " L"]) -> None:
        """The cache of each row's accepted tokens but the last, for `result`."""
        if self.config.return_dict_in_generate:
            new = np.array([len(tokens) for tokens in self.tokens])
            used = engine.layout.length[origins[: self.rows]] + new - 1
            self.cache = engine.state.cache.take(jnp.arange(self.rows)).rewind(jnp.asarray(used))

    @property
    def _drafted(self) -> int:
        """Tokens drafted at once; 0 where none are."""
        if self.assistant_model is not None:
            return self.config.num_assistant_tokens
        return self.config.prompt_lookup_num_tokens or 0

    def _dispatch(self, engine: Engine) -> Dispatch:
        """The loop on the device that the settings ask for."""
        step, static = loop, {}
        if self._drafted:
            step = lookup_loop
            static = {"tokens": self._drafted, "max_ngram": self.config.max_matching_ngram_size}

        def send(state: Any) -> Any:
            return engine.compiled(
                step, state, engine.settings, self.each, most=STEPS, outputs=self.outputs, **static
            )

        return send

    def _with_assistant(self, engine: Engine, origins: Int[np.ndarray, " L"]) -> Iterator[Made]:
        """Steps in which a second model drafts; its cache goes along with the model's."""
        assistant = self.engine(CompiledModel(self.assistant_model), spare=engine.spare)
        assistant.fill_up()
        assistant.repeat(self.times)
        both = CompiledModel((self.compiled.model, self.assistant_model))
        confidence = jnp.float32(self.config.assistant_confidence_threshold)
        engine.state = Pair(engine.state, assistant.state.cache)

        def send(pair: Pair) -> Any:
            return both(
                assisted_loop,
                pair,
                engine.settings,
                self.each,
                assistant.settings,
                confidence,
                most=STEPS,
                tokens=self._drafted,
                outputs=self.outputs,
            )

        def refill(stale: Bool[np.ndarray, " L2"]) -> None:
            ours, theirs = np.split(stale, 2)
            if ours.any():
                engine.refill(ours)
            if theirs.any():
                pair = engine.state
                assistant.state = replace(pair.lanes, cache=pair.assistant)
                assistant.refill(theirs)
                engine.state = Pair(pair.lanes, assistant.state.cache)

        yield from engine.steps(send, ahead=not self.criteria, refill=refill)

    def _record(self, engine: Engine, origins: Int[np.ndarray, " L"]) -> None:
        lanes = origins[: self.rows]
        self.recorder = Recorder(engine.layout, lanes, self.mask[lanes], engine.prefill_records)

    # --- beams ----------------------------------------------------------------------------------------------

    def _beams(self) -> None:
        chosen, beams = self.config, self.config.num_beams
        engine = self.engine(self.compiled, grows=False)
        logits = engine.prefill()
        dummies = engine.state.finished[: engine.rows]
        origins = engine.repeat(beams)
        self._record(engine, origins)
        rules = beam.Rules(chosen.early_stopping, chosen.do_sample, len(chosen.eos_token_ids))
        penalty = jnp.float32(chosen.length_penalty)
        search = _start(engine.state, beams, chosen.max_new_tokens, dummies)
        search = self._next_beams(engine, search, logits[origins], {}, penalty, rules)
        if engine.on_host is not None or self.criteria:
            while not search.over:
                engine.state = search.lanes
                logits, records = engine.one_step()
                search = replace(search, lanes=engine.state)
                search = self._next_beams(engine, search, logits, records, penalty, rules)
        else:
            engine.state = search

            def send(search: beam.Search) -> Any:
                return self.compiled(
                    beam.loop,
                    search,
                    engine.settings,
                    self.each,
                    penalty,
                    most=STEPS,
                    rules=rules,
                    outputs=self.outputs,
                )

            for made in engine.steps(send, ahead=True):
                self.recorder.add(made)
            search = engine.state
        self._finish_beams(engine, search)

    def _next_beams(
        self,
        engine: Engine,
        search: beam.Search,
        logits: Any,
        records: Records,
        penalty: Any,
        rules: beam.Rules,
    ) -> beam.Search:
        """One step with the host's processors and criteria between the parts on the device."""
        settings = engine.settings
        scores = _beam_scores(logits, search.sequences, settings._replace(after=()))
        if engine.on_host is not None:
            scores = jnp.asarray(self.on_host(search.sequences, scores), jnp.float32)
        scores = _apply_all(settings.after, rows_of(search.sequences, len(scores)), scores)
        candidates = _propose(search, scores, settings, rules)
        ending = _ends(search, candidates, settings)
        if self.criteria:
            made = int(search.sequences.new[0]) + 1
            tokens = np.asarray(_extended(search, candidates)[0])[: self.batch, :, :made]
            stopped = self.criteria(self.with_prompts(tokens.reshape(-1, made)), None)
            ending = np.array(ending)
            ending[: self.batch] |= stopped.reshape(self.batch, -1)
        own = {"logits": logits[: len(scores), None], "scores": scores[:, None]}
        records = records | {name: own[name] for name in self.outputs & own.keys()}
        search = _advance(search, candidates, jnp.asarray(ending), settings, penalty, rules)
        tokens = np.zeros((1, len(scores), 1), np.int32)
        self.recorder.add(Made(tokens, np.zeros(0, bool), jax.tree.map(lambda x: x[None], records)))
        return search

    def _finish_beams(self, engine: Engine, search: beam.Search) -> None:
        """The best sequences of each row, and what goes with them."""
        wanted = self.config.num_return_sequences
        tokens, origins, scores = (
            np.asarray(x)[: self.batch, :wanted].reshape(self.batch * wanted, *x.shape[2:])
            for x in (search.best_tokens, search.best_origins, search.best_scores)
        )
        lengths = (origins >= 0).sum(axis=1)
        self.tokens = [list(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        self.beam_indices = origins[:, : lengths.max()]
        self.beam_scores = scores

    def _cache_of_beams(self) -> KVCache:
        """A cache of the returned sequences: those of the running beams went other ways."""
        times = len(self.tokens) // self.batch
        dummies = [np.zeros(0, np.int32)] * (padded_rows(len(self.tokens)) - len(self.tokens))
        prompts = [row[used] for row, used in zip(self.ids, self.mask, strict=True) for _ in range(times)]
        rows = [np.append(row, made).astype(np.int32) for row, made in zip(prompts, self.tokens, strict=True)]
        config = self.compiled.model.config
        engine = Engine(
            self.compiled,
            Layout(rows + dummies),
            self.settings(config, prompts + dummies, (), ())._replace(guidance_scale=None),
            max_new_tokens=1,
            new_cache=partial(new_cache_of, self.compiled.model, self.config.cache_implementation),
            grows=not self.slides,
        )
        engine.fill_up()
        return engine.state.cache.take(jnp.arange(len(rows)))

    def _accept(self, engine: Engine, made: Made) -> Iterator[Int[np.ndarray, " R"]]:
        """Takes over a dispatch's tokens, up to where the host's criteria stop a row."""
        self.recorder.add(made)
        before = self.stopped.copy()
        for tokens in np.moveaxis(made.tokens[:, : self.rows], 2, 1).reshape(-1, self.rows):
            making = (tokens != NO_TOKEN) & ~self.stopped
            if not making.any():
                continue
            for row in np.flatnonzero(making):
                self.tokens[row].append(int(tokens[row]))
            if self.criteria:
                self.stopped |= self.criteria(self.with_prompts(self.tokens), None) & making
            tokens = np.where(making, tokens, NO_TOKEN)
            if self.streamer is not None:
                self.streamer.put(np.where(making, tokens, self.config.pad_token_id or 0))
            yield tokens
        if (self.stopped != before).any():
            new = np.zeros(engine.rows, np.int32)
            new[: self.rows] = [len(tokens) for tokens in self.tokens]
            finished = np.zeros(engine.rows, bool)
            finished[: self.rows] = self.stopped
            engine.truncate(new, finished)

    # --- the answer -----------------------------------------------------------------------------------------

    def result(self) -> Any:
        """Ids [R, length], or with `return_dict_in_generate` everything that was asked for."""
        sequences = jnp.asarray(self.with_prompts(self.tokens))
        if not self.config.return_dict_in_generate:
            return sequences
        if self.config.num_beams > 1:
            return GenerateBeamDecoderOnlyOutput(
                sequences=sequences,
                sequences_scores=jnp.asarray(self.beam_scores) if "scores" in self.outputs else None,
                beam_indices=jnp.asarray(self.beam_indices),
                past_key_values=self._cache_of_beams(),
                **self.recorder.collect(self.outputs),
            )
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            past_key_values=self.cache,
            **self.recorder.collect(self.outputs, max(map(len, self.tokens))),
        )


class PrefixConstraint:
    """`prefix_allowed_tokens_fn(row of the batch, its ids)`, asked for every row at every step.

    Where a whole group of beams has no allowed token with a finite score, the allowed ones are forced, as in
    the reference.
    """

    def __init__(self, allowed: Callable[[int, np.ndarray], Any], num_beams: int):
        self._allowed, self._num_beams = allowed, num_beams

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        mask = np.full_like(scores, -np.inf)
        for row, ids in enumerate(input_ids):
            tokens = np.asarray(self._allowed(row // self._num_beams, ids), np.int64).reshape(-1)
            if not tokens.size:
                raise ValueError(
                    f"prefix_allowed_tokens_fn allows no token for row {row // self._num_beams}; "
                    "it must leave at least one"
                )
            mask[row, tokens] = 0
        allowed = scores + mask
        lost = np.isneginf(allowed.max(axis=1)).reshape(-1, self._num_beams).all(axis=1)
        return np.where(np.repeat(lost, self._num_beams)[:, None], mask, allowed)


def rows_of(sequences: Sequences, rows: int) -> Sequences:
    """The first `rows`: those that make tokens."""
    return jax.tree.map(lambda x: x[:rows], sequences)


def split_at_host(processors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The processors before, between and after those that run on the host."""
    host = [index for index, one in enumerate(processors) if not isinstance(one, LogitsProcessor)]
    if not host:
        return tuple(processors), (), ()
    first, last = host[0], host[-1] + 1
    return tuple(processors[:first]), tuple(processors[first:last]), tuple(processors[last:])


def rope_bounds(
    config: Any, rope_list: str, lane_rows: Sequence[Any], max_new_tokens: int
) -> tuple[Any, Any]:
    """The least [L] and the most that a row's length counts when its rope list is chosen."""
    least = np.zeros(len(lane_rows), np.int32)
    most = NEVER
    if rope_list == "long":
        least[:] = config.original_max_position_embeddings + 1
    elif rope_list == "short":
        most = 1
    elif rope_list == "planned":
        least[:] = [len(row) + max_new_tokens for row in lane_rows]
    return jnp.asarray(least), jnp.int32(most)


def new_cache_of(model: Any, implementation: str | None, lanes: int, columns: int) -> KVCache:
    """An empty cache of the kind that `cache_implementation` names."""
    return model.init_cache(
        lanes,
        columns,
        dtype="int8" if implementation == "quantized" else None,
        sliding=implementation == "sliding_window",
    )


def cache_like(config: Any, past: KVCache, lanes: int, columns: int) -> KVCache:
    """An empty cache of the kind that `past` is."""
    slots = columns if past.window is None else past.max_length
    return KVCache.create(config, lanes, slots, past.keys[0].dtype, past.window)
