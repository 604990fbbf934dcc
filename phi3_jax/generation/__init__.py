"""Generation: steps and loops on the device, and the host code that drives them."""

from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.generate import generate
from phi3_jax.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from phi3_jax.generation.processors import AllowedTokensLogitsProcessor, LogitsProcessor
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.stopping import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from phi3_jax.generation.stream import stream_text, stream_tokens
from phi3_jax.generation.streamers import BaseStreamer, TextIteratorStreamer, TextStreamer

__all__ = [
    "AllowedTokensLogitsProcessor",
    "BaseStreamer",
    "CompiledModel",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "LogitsProcessor",
    "MaxTimeCriteria",
    "Sequences",
    "StopStringCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "generate",
    "stream_text",
    "stream_tokens",
]
