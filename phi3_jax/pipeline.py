"""A checkpoint made ready to answer: model, tokenizer and end tokens from one path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_model
from phi3_jax.tokenizer import Phi3Tokenizer

TURN_ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")
"""Tokens that end an answer in the family, for checkpoints without a generation_config.json."""


@dataclass(frozen=True)
class Pipeline:
    """What it takes to turn a prompt into an answer."""

    compiled: CompiledModel
    tokenizer: Phi3Tokenizer

    @classmethod
    def load(
        cls,
        path: Path | Checkpoint,
        *,
        dtype: Any,
        mesh: Mesh | None = None,
        config: Phi3Config | None = None,
    ) -> "Pipeline":
        """Loads a directory in Hugging Face's layout or a GGUF file; `config` in place of its own.

        A checkpoint that names no end tokens gets those that its config and its tokenizer tell.

        Raises:
            CheckpointError: the model cannot be loaded, or it comes without a tokenizer.
        """
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.source.tokenizer()
        model = load_model(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh, config=config)
        if len(tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"{checkpoint.source.path}: the tokenizer has {len(tokenizer)} tokens and the model "
                f"{model.config.vocab_size}; they belong to different models"
            )
        told = model.generation_config
        if told.eos_token_id is None or told.extra.get("_from_model_config"):
            model.generation_config = told.replace(eos_token_id=end_tokens(model, tokenizer))
        return cls(CompiledModel(model), tokenizer)


def end_tokens(model: Phi3ForCausalLM, tokenizer: Phi3Tokenizer) -> list[int]:
    """Every token that ends an answer as far as config and tokenizer tell."""
    named = (tokenizer.convert_tokens_to_ids([token])[0] for token in TURN_ENDS)
    unknown = tokenizer.unk_token_id
    found = {token for token in named if token is not None and token != unknown}
    return sorted({*model.config.eos_token_ids, *found})
