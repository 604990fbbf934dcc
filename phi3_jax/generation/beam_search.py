"""Beam search as the host drives it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.generation import beam
from phi3_jax.generation.engine import DecodingEngine, StepResult
from phi3_jax.generation.forward import Records
from phi3_jax.generation.outputs import GenerateBeamDecoderOnlyOutput
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.request import STEPS, GenerationRequest
from phi3_jax.generation.sampling import score_records

_start = jax.jit(beam.start, static_argnums=(1, 2))
_scores = jax.jit(beam.beam_scores)
_process = jax.jit(LogitsProcessorList.__call__)
_propose = jax.jit(beam.propose, static_argnums=3)
_ends = jax.jit(beam.ends)
_extend = jax.jit(beam.extend)
_advance = jax.jit(beam.advance, static_argnums=5, donate_argnums=0)


class BeamSearch:
    """A beam search over all rows of a request; `run` does the search, `result` returns the user's output."""

    def __init__(self, request: GenerationRequest):
        config = request.config
        self.request = request
        self.rules = beam.BeamRules(config.early_stopping, len(config.eos_token_ids))
        self.penalty = jnp.float32(config.length_penalty)

    def run(self) -> Iterator[Int[np.ndarray, " R"]]:
        """Runs the whole search; yields nothing, as no token is certain before the end."""
        request = self.request
        engine = request.engine(grows=False)
        logits = engine.prefill()
        is_padding = engine.state.finished[: engine.rows]
        origins = engine.repeat(request.config.num_beams)
        self.recorder = request.recorder(engine, origins)
        search = _start(engine.state, request.config.num_beams, request.config.max_new_tokens, is_padding)
        search = self._step_with_host(engine, search, logits[origins], {})
        if engine.on_host is not None or request.criteria:
            while not search.over:
                engine.state = search.state
                logits, records = engine.one_step()
                search = self._step_with_host(engine, replace(search, state=engine.state), logits, records)
        else:
            engine.state = search
            for result in engine.steps(self._dispatch(engine), ahead=True):
                self.recorder.add(result)
            search = engine.state
        self._take_best(search)
        yield from ()

    def _dispatch(self, engine: DecodingEngine) -> Any:
        request = self.request

        def send(search: beam.BeamState) -> Any:
            return engine.compiled(
                beam.loop,
                search,
                engine.settings,
                request.steps_per_dispatch,
                self.penalty,
                most=STEPS,
                rules=self.rules,
                outputs=request.outputs,
            )

        return send

    def _step_with_host(
        self, engine: DecodingEngine, search: beam.BeamState, logits: Float[Array, "B V"], records: Records
    ) -> beam.BeamState:
        """Does one step, with the host's processors and criteria between its parts on the device."""
        request, settings = self.request, engine.settings
        scores = _scores(logits, search.sequences, settings._replace(after_host=LogitsProcessorList()))
        if engine.on_host is not None:
            scores = engine.on_host(search.sequences, scores)
        scores = _process(settings.after_host, search.sequences.first(len(scores)), scores)
        candidates = _propose(search, scores, settings, self.rules)
        ending = _ends(search, candidates, settings)
        if request.criteria:
            count = int(search.sequences.new[0]) + 1
            tokens = np.asarray(_extend(search, candidates)[0])[: request.batch, :, :count]
            stopped = request.stopped(list(tokens.reshape(-1, count)))
            ending = ending.at[: request.batch].max(stopped.reshape(request.batch, -1))
        records = records | score_records(logits, scores, request.outputs)
        self.recorder.add(
            StepResult(
                np.zeros((1, len(scores), 1), np.int32),
                np.zeros(0, bool),
                jax.tree.map(lambda x: x[None], records),
            )
        )
        return _advance(search, candidates, ending, settings, self.penalty, self.rules)

    def _take_best(self, search: beam.BeamState) -> None:
        """Takes the best sequences of each prompt."""
        request, count = self.request, self.request.config.num_return_sequences
        tokens, self.origins, self.scores = (
            np.asarray(x)[: request.batch, :count].reshape(request.batch * count, *x.shape[2:])
            for x in (search.best_tokens, search.best_origins, search.best_scores)
        )
        self.lengths = (self.origins >= 0).sum(axis=1)
        self.tokens = [row[:length].tolist() for row, length in zip(tokens, self.lengths, strict=True)]

    def result(self) -> Any:
        """Returns ids [R, length], or the whole output with `return_dict_in_generate`."""
        request = self.request
        sequences = jax.device_put(request.with_prompts(self.tokens))  # asarray compiles for each shape
        if not request.config.return_dict_in_generate:
            return sequences
        prompts = request.prompts(request.config.num_return_sequences)
        rows = [np.append(prompt, new) for prompt, new in zip(prompts, self.tokens, strict=True)]
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=jnp.asarray(self.scores) if "scores" in request.outputs else None,
            beam_indices=jnp.asarray(self.origins[:, : self.lengths.max()]),
            past_key_values=request.cache_of(rows),  # the running beams' caches hold other sequences
            **self.recorder.collect(request.outputs),
        )
