"""Beam search from the host's side."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.generation import beam
from phi3_jax.generation.engine import DecodingEngine, GeneratedTokens
from phi3_jax.generation.forward import Records
from phi3_jax.generation.host import rows_of
from phi3_jax.generation.outputs import GenerateBeamDecoderOnlyOutput
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.request import STEPS, GenerationRequest

_start = jax.jit(beam.start, static_argnums=(1, 2))
_scores = jax.jit(beam.beam_scores)
_process = jax.jit(LogitsProcessorList.__call__)
_propose = jax.jit(beam.propose, static_argnums=3)
_ends = jax.jit(beam.ends)
_extended = jax.jit(beam.extended)
_advance = jax.jit(beam.advance, static_argnums=5, donate_argnums=0)


class BeamSearch:
    """The rows' beams grow together. `run` does the search, `result` is what the user gets."""

    def __init__(self, request: GenerationRequest):
        chosen = request.config
        self.request = request
        self.rules = beam.Rules(chosen.early_stopping, len(chosen.eos_token_ids))
        self.penalty = jnp.float32(chosen.length_penalty)

    def run(self) -> Iterator[Int[np.ndarray, " R"]]:
        """The whole search; it gives no token before its end, and none here."""
        request = self.request
        engine = request.engine(grows=False)
        logits = engine.prefill()
        dummies = engine.state.finished[: engine.rows]
        origins = engine.repeat(request.config.num_beams)
        self.recorder = request.recorder(engine, origins)
        search = _start(engine.state, request.config.num_beams, request.config.max_new_tokens, dummies)
        search = self._next(engine, search, logits[origins], {})
        if engine.on_host is not None or request.criteria:
            while not search.over:
                engine.state = search.lanes
                logits, records = engine.one_step()
                search = self._next(engine, replace(search, lanes=engine.state), logits, records)
        else:
            engine.state = search
            for made in engine.steps(self._send(engine), ahead=True):
                self.recorder.add(made)
            search = engine.state
        self._keep(search)
        yield from ()

    def _send(self, engine: DecodingEngine) -> Any:
        request = self.request

        def send(search: beam.BeamState) -> Any:
            return engine.compiled(
                beam.loop,
                search,
                engine.settings,
                request.each,
                self.penalty,
                most=STEPS,
                rules=self.rules,
                outputs=request.outputs,
            )

        return send

    def _next(
        self, engine: DecodingEngine, search: beam.BeamState, logits: Float[Array, "L V"], records: Records
    ) -> beam.BeamState:
        """One step with the host's processors and criteria between its parts on the device."""
        request, settings = self.request, engine.settings
        scores = _scores(logits, search.sequences, settings._replace(after_host=LogitsProcessorList()))
        if engine.on_host is not None:
            scores = engine.on_host(search.sequences, scores)
        scores = _process(settings.after_host, rows_of(search.sequences, len(scores)), scores)
        candidates = _propose(search, scores, settings, self.rules)
        ending = _ends(search, candidates, settings)
        if request.criteria:
            made = int(search.sequences.new[0]) + 1
            tokens = np.asarray(_extended(search, candidates)[0])[: request.batch, :, :made]
            stopped = request.stopped(list(tokens.reshape(-1, made)))
            ending = ending.at[: request.batch].max(stopped.reshape(request.batch, -1))
        own = {"logits": logits[: len(scores), None], "scores": scores[:, None]}
        records = records | {name: own[name] for name in request.outputs & own.keys()}
        self.recorder.add(
            GeneratedTokens(
                np.zeros((1, len(scores), 1), np.int32),
                np.zeros(0, bool),
                jax.tree.map(lambda x: x[None], records),
            )
        )
        return _advance(search, candidates, ending, settings, self.penalty, self.rules)

    def _keep(self, search: beam.BeamState) -> None:
        """The best sequences of each row."""
        request, wanted = self.request, self.request.config.num_return_sequences
        tokens, self.origins, self.scores = (
            np.asarray(x)[: request.batch, :wanted].reshape(request.batch * wanted, *x.shape[2:])
            for x in (search.best_tokens, search.best_origins, search.best_scores)
        )
        self.lengths = (self.origins >= 0).sum(axis=1)
        self.tokens = [row[:length].tolist() for row, length in zip(tokens, self.lengths, strict=True)]

    def result(self) -> Any:
        """Ids [R, length], or with `return_dict_in_generate` everything that was asked for."""
        request = self.request
        sequences = jax.device_put(request.with_prompts(self.tokens))  # asarray compiles for each shape
        if not request.config.return_dict_in_generate:
            return sequences
        prompts = request.prompts(request.config.num_return_sequences)
        whole = [np.append(row, made) for row, made in zip(prompts, self.tokens, strict=True)]
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=jnp.asarray(self.scores) if "scores" in request.outputs else None,
            beam_indices=jnp.asarray(self.origins[:, : self.lengths.max()]),
            past_key_values=request.cache_of(whole),  # those of the running beams went other ways
            **self.recorder.collect(request.outputs),
        )
