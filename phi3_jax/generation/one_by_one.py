"""Greedy search and sampling from the host's side, with drafts or without."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.engine import DecodingEngine, Dispatch, GeneratedTokens
from phi3_jax.generation.outputs import GenerateDecoderOnlyOutput
from phi3_jax.generation.request import STEPS, GenerationRequest
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.speculative import AssistedState, assisted_loop, lookup_loop
from phi3_jax.generation.state import NO_TOKEN


class OneByOne:
    """Every row grows by itself. `run` makes the tokens, `result` is what the user gets."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.tokens: list[list[int]] = [[] for _ in range(request.rows)]
        self.stopped = np.zeros(request.rows, bool)
        """Rows that the host's criteria have ended."""

    def run(self) -> Iterator[Int[np.ndarray, " R"]]:
        """Each step's tokens as they come, NO_TOKEN in rows without one."""
        request = self.request
        engine = request.engine(spare=request.drafted and request.drafted + 1)
        logits = engine.prefill()
        origins = engine.repeat(request.times)
        self.recorder = request.recorder(engine, origins)
        try:
            made = engine.choose(logits[origins], {})
            yield from self._accept(engine, made)
            dispatches = iter(()) if made.finished.all() else self._dispatches(engine)
            for made in dispatches:
                yield from self._accept(engine, made)
        except GeneratorExit:  # the reader has lost interest, and may go on from here all the same
            self._keep_cache(engine, origins)
            raise
        self._keep_cache(engine, origins)

    def _keep_cache(self, engine: DecodingEngine, origins: Int[np.ndarray, " L"]) -> None:
        """The cache of each row's accepted tokens but the last, for the result."""
        request = self.request
        if request.config.return_dict_in_generate:
            new = np.array([len(tokens) for tokens in self.tokens])
            used = engine.layout.length[origins[: request.rows]] + new - 1
            self.cache = engine.state.cache.take(jnp.arange(request.rows)).rewind(jnp.asarray(used))

    def _dispatches(self, engine: DecodingEngine) -> Iterator[GeneratedTokens]:
        request = self.request
        ahead = not request.criteria
        if request.on_host is not None:
            return engine.steps_with_host()
        if request.assistant_model is not None:
            return self._with_assistant(engine, ahead)
        return engine.steps(self._looking_up(engine) if request.drafted else self._plain(engine), ahead=ahead)

    def _plain(self, engine: DecodingEngine) -> Dispatch:
        request = self.request

        def send(state: Any) -> Any:
            return engine.compiled(
                loop, state, engine.settings, request.each, most=STEPS, outputs=request.outputs
            )

        return send

    def _looking_up(self, engine: DecodingEngine) -> Dispatch:
        request = self.request

        def send(state: Any) -> Any:
            return engine.compiled(
                lookup_loop,
                state,
                engine.settings,
                request.each,
                most=STEPS,
                tokens=request.drafted,
                max_ngram=request.config.max_matching_ngram_size,
                outputs=request.outputs,
            )

        return send

    def _with_assistant(self, engine: DecodingEngine, ahead: bool) -> Iterator[GeneratedTokens]:
        """Steps in which a second model drafts; its cache goes along with the model's."""
        request = self.request
        assistant = request.assistant(engine)
        assistant.fill_up()
        assistant.repeat(request.times)
        both = CompiledModel((engine.compiled.model, request.assistant_model))
        confidence = jnp.float32(request.config.assistant_confidence_threshold)

        def send(pair: AssistedState) -> Any:
            return both(
                assisted_loop,
                pair,
                engine.settings,
                request.each,
                assistant.settings,
                confidence,
                most=STEPS,
                tokens=request.drafted,
                outputs=request.outputs,
            )

        def refill(stale: Bool[np.ndarray, " L2"]) -> None:
            ours, theirs = np.split(stale, 2)
            if ours.any():
                engine.refill(ours)
            if theirs.any():
                pair: AssistedState = engine.state
                assistant.state = replace(pair.lanes, cache=pair.assistant)
                assistant.refill(theirs)
                engine.state = AssistedState(pair.lanes, assistant.state.cache)

        engine.state = AssistedState(engine.state, assistant.state.cache)
        yield from engine.steps(send, ahead=ahead, refill=refill)

    def _accept(self, engine: DecodingEngine, made: GeneratedTokens) -> Iterator[Int[np.ndarray, " R"]]:
        """Takes over a dispatch's tokens, up to where the host's criteria stop a row."""
        request = self.request
        self.recorder.add(made)
        before = self.stopped.copy()
        for tokens in np.moveaxis(made.tokens[:, : request.rows], 2, 1).reshape(-1, request.rows):
            making = (tokens != NO_TOKEN) & ~self.stopped
            if not making.any():
                continue
            for row in np.flatnonzero(making):
                self.tokens[row].append(int(tokens[row]))
            if request.criteria:
                self.stopped |= request.stopped(self.tokens) & making
            yield np.where(making, tokens, NO_TOKEN)
        if (self.stopped != before).any():
            new = np.zeros(engine.rows, np.int32)
            new[: request.rows] = [len(tokens) for tokens in self.tokens]
            finished = np.zeros(engine.rows, bool)
            finished[: request.rows] = self.stopped
            engine.truncate(new, finished)

    def result(self) -> Any:
        """Ids [R, length], or with `return_dict_in_generate` everything that was asked for."""
        request = self.request
        sequences = jax.device_put(request.with_prompts(self.tokens))  # asarray compiles for each shape
        if not request.config.return_dict_in_generate:
            return sequences
        new = max(map(len, self.tokens))
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            past_key_values=self.cache,
            **self.recorder.collect(request.outputs, new),
        )
