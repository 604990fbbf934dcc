"""Streams one answer: an iterator of tokens, or of text."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.generate import Call
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.tokenizer import Phi3Tokenizer


def stream_tokens(model: CausalLM | CompiledModel, prompt: Sequence[int], **options: Any) -> Iterator[int]:
    """Yields the tokens that follow `prompt`, with an end token.

    `options` are those of `Phi3ForCausalLM.generate`, for one sequence without beams. The next step is sent
    to the device before a token is yielded, so the device does not wait for the reader.

    Raises:
        UserError: as `generate`, or for more than one sequence; before the first token.
    """
    call = single_sequence_call(model, prompt, **options)
    return (int(tokens[0]) for tokens in call.run())


def stream_text(
    model: CausalLM | CompiledModel,
    tokenizer: Phi3Tokenizer,
    prompt: str | Sequence[int],
    *,
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[str]:
    """Yields the text that follows `prompt` (text, or ids as of `tokenizer.apply_chat_template`) in pieces.

    A piece ends where the text is certain: not within a character of several tokens. See `stream_tokens`.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = stream_tokens(model, ids, tokenizer=tokenizer, **options)

    def pieces() -> Iterator[str]:
        decoder = tokenizer.stream(skip_special_tokens=skip_special_tokens)
        for token in tokens:
            if piece := decoder.put(token):
                yield piece
        if piece := decoder.end():
            yield piece

    return pieces()


def single_sequence_call(model: CausalLM | CompiledModel, prompt: Sequence[int], **options: Any) -> Call:
    """Returns a call for one sequence whose tokens come one by one."""
    compiled = model if isinstance(model, CompiledModel) else CompiledModel(model)
    if not len(prompt):
        raise UserError("the prompt is empty: there is nothing to continue")
    options.setdefault("attention_mask", np.ones((1, len(prompt)), np.int32))  # there is no padding
    call = Call(compiled, [list(prompt)], step_by_step=True, **options)
    config = call.request.config
    if call.request.copies > 1:
        raise UserError(
            f"num_beams={config.num_beams} and num_return_sequences={config.num_return_sequences} "
            "cannot be streamed: give 1 for both"
        )
    return call
