"""`generate`: runs a call to its end, or step by step."""

from collections.abc import Generator
from typing import Any

import numpy as np
from jaxtyping import Int

from phi3_jax.generation.beam_search import BeamSearch
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.one_by_one import OneByOne
from phi3_jax.generation.request import GenerationRequest
from phi3_jax.generation.state import NO_TOKEN


def generate(compiled: CompiledModel, input_ids: Any = None, *arguments: Any, **options: Any) -> Any:
    """Does what `Phi3ForCausalLM.generate` documents, with a model that is already flattened."""
    call = Call(compiled, input_ids, *arguments, **options)
    for _ in call.run():
        pass
    return call.result()


class Call:
    """One call of generate: `run` generates the tokens, then `result` returns the user's output.

    All arguments are checked here, before any work.
    """

    def __init__(self, compiled: CompiledModel, input_ids: Any = None, *arguments: Any, **options: Any):
        self.request = GenerationRequest(compiled, input_ids, *arguments, **options)
        beams = self.request.config.num_beams > 1
        self._mode = BeamSearch(self.request) if beams else OneByOne(self.request)

    def run(self) -> Generator[Int[np.ndarray, " R"], None, None]:
        """Generates the tokens and yields each step's as they come, NO_TOKEN in rows without one.

        When closed early, the tokens up to then are the result.
        """
        request = self.request
        streamer = request.streamer
        try:
            if streamer is not None:
                streamer.put(np.repeat(request.ids, request.copies, axis=0))
            for tokens in self._mode.run():
                if streamer is not None:
                    streamer.put(np.where(tokens == NO_TOKEN, request.config.pad_token_id or 0, tokens))
                yield tokens
        finally:  # a reader in another thread waits for the end
            if streamer is not None:
                streamer.end()

    @property
    def tokens(self) -> list[list[int]]:
        """Each row's new tokens up to now."""
        return self._mode.tokens

    def result(self) -> Any:
        """Returns ids [R, length], or the whole output with `return_dict_in_generate`."""
        return self._mode.result()
