"""Greedy search and sampling as the host drives them, with drafts or without."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.engine import DecodingEngine, Dispatch, StepResult
from phi3_jax.generation.outputs import GenerateDecoderOnlyOutput
from phi3_jax.generation.request import STEPS, GenerationRequest
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.speculative import AssistedState, assisted_loop, lookup_loop
from phi3_jax.generation.state import NO_TOKEN


class OneByOne:
    """Generates every row on its own; `run` generates the tokens, `result` returns the user's output."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.tokens: list[list[int]] = [[] for _ in range(request.rows)]
        self.stopped = np.zeros(request.rows, bool)
        """Rows that the host's criteria have ended."""

    def run(self) -> Iterator[Int[np.ndarray, " R"]]:
        """Yields each step's tokens as they come, NO_TOKEN in rows without one."""
        request = self.request
        engine = request.engine(spare=request.draft_tokens and request.draft_tokens + 1)
        logits = engine.prefill()
        origins = engine.repeat(request.copies)
        self.recorder = request.recorder(engine, origins)
        try:
            result = engine.choose(logits[origins], {})
            yield from self._accept(engine, result)
            results = iter(()) if result.finished.all() else self._results(engine)
            for result in results:
                yield from self._accept(engine, result)
        except GeneratorExit:  # a reader that stops early may still continue from the cache
            self._keep_cache(engine, origins)
            raise
        self._keep_cache(engine, origins)

    def _keep_cache(self, engine: DecodingEngine, origins: Int[np.ndarray, " B"]) -> None:
        """Keeps the cache of each row's accepted tokens but the last, for the output."""
        request = self.request
        if request.config.return_dict_in_generate:
            new = np.array([len(tokens) for tokens in self.tokens])
            used = engine.layout.length[origins[: request.rows]] + new - 1
            self.cache = engine.state.cache.take(jnp.arange(request.rows)).rewind(jnp.asarray(used))

    def _results(self, engine: DecodingEngine) -> Iterator[StepResult]:
        request = self.request
        ahead = not request.criteria
        if request.on_host is not None:
            return engine.steps_with_host()
        if request.assistant_model is not None:
            return self._assisted_steps(engine, ahead)
        dispatch = self._dispatch_lookup(engine) if request.draft_tokens else self._dispatch(engine)
        return engine.steps(dispatch, ahead=ahead)

    def _dispatch(self, engine: DecodingEngine) -> Dispatch:
        request = self.request

        def send(state: Any) -> Any:
            return engine.compiled(
                loop, state, engine.settings, request.steps_per_dispatch, most=STEPS, outputs=request.outputs
            )

        return send

    def _dispatch_lookup(self, engine: DecodingEngine) -> Dispatch:
        request = self.request

        def send(state: Any) -> Any:
            return engine.compiled(
                lookup_loop,
                state,
                engine.settings,
                request.steps_per_dispatch,
                most=STEPS,
                tokens=request.draft_tokens,
                max_ngram=request.config.max_matching_ngram_size,
                outputs=request.outputs,
            )

        return send

    def _assisted_steps(self, engine: DecodingEngine, ahead: bool) -> Iterator[StepResult]:
        """Runs steps in which a second model drafts; its cache travels with the model's state."""
        request = self.request
        assistant = request.assistant(engine)
        assistant.fill_up()
        assistant.repeat(request.copies)
        both = CompiledModel((engine.compiled.model, request.assistant_model))
        confidence = jnp.float32(request.config.assistant_confidence_threshold)

        def send(pair: AssistedState) -> Any:
            return both(
                assisted_loop,
                pair,
                engine.settings,
                request.steps_per_dispatch,
                assistant.settings,
                confidence,
                most=STEPS,
                tokens=request.draft_tokens,
                outputs=request.outputs,
            )

        def recompute(outdated: Bool[np.ndarray, " B2"]) -> None:
            of_model, of_assistant = np.split(outdated, 2)
            if of_model.any():
                engine.recompute(of_model)
            if of_assistant.any():
                pair: AssistedState = engine.state
                assistant.state = pair.assistant_state
                assistant.recompute(of_assistant)
                engine.state = AssistedState(pair.state, assistant.state.cache)

        engine.state = AssistedState(engine.state, assistant.state.cache)
        yield from engine.steps(send, ahead=ahead, recompute=recompute)

    def _accept(self, engine: DecodingEngine, result: StepResult) -> Iterator[Int[np.ndarray, " R"]]:
        """Takes the tokens of a dispatch, up to where the host's criteria stop a row."""
        request = self.request
        self.recorder.add(result)
        before = self.stopped.copy()
        for tokens in np.moveaxis(result.tokens[:, : request.rows], 2, 1).reshape(-1, request.rows):
            accepted = (tokens != NO_TOKEN) & ~self.stopped
            if not accepted.any():
                continue
            for row in np.flatnonzero(accepted):
                self.tokens[row].append(int(tokens[row]))
            if request.criteria:
                self.stopped |= request.stopped(self.tokens) & accepted
            yield np.where(accepted, tokens, NO_TOKEN)
        if (self.stopped != before).any():
            new = np.zeros(engine.rows, np.int32)
            new[: request.rows] = [len(tokens) for tokens in self.tokens]
            finished = np.zeros(engine.rows, bool)
            finished[: request.rows] = self.stopped
            engine.truncate(new, finished)

    def result(self) -> Any:
        """Returns ids [R, length], or the whole output with `return_dict_in_generate`."""
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
