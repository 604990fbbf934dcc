"""Loads a model, its tokenizer and its end tokens from one path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint import Checkpoint, CheckpointError
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.lora import ModelPaths, load_merged, open_model
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.quantization import Quantization
from phi3_jax.tokenizer import Phi3Tokenizer

TURN_ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")
"""The tokens that end an answer in this family, for checkpoints without a generation_config.json."""


@dataclass(frozen=True)
class Pipeline:
    """A compiled model and its tokenizer, which together answer prompts."""

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
        adapter: Path | None = None,
        quantization: Quantization | str | None = None,
    ) -> "Pipeline":
        """Loads a directory in Hugging Face's layout or a GGUF file; `config` replaces the checkpoint's.

        The adapters of the directory `adapter` are merged into the weights. `quantization` is as in
        `from_pretrained`.

        A checkpoint without end tokens of its own gets those of its config and tokenizer.

        Raises:
            CheckpointError: the model cannot be loaded, or has no tokenizer.
        """
        checkpoint = path if isinstance(path, Checkpoint) else open_model(ModelPaths(path, adapter))
        tokenizer = checkpoint.source.tokenizer()
        options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantization": quantization}
        model = load_merged(Phi3ForCausalLM, checkpoint, adapter, config=config, **options)
        if len(tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"{checkpoint.source.path}: the tokenizer has {len(tokenizer)} tokens and the model "
                f"{model.config.vocab_size}; they belong to different models"
            )
        generation_config = model.generation_config
        if generation_config.eos_token_id is None or generation_config.extra.get("_from_model_config"):
            model.generation_config = generation_config.replace(eos_token_id=end_tokens(model, tokenizer))
        return cls(CompiledModel(model), tokenizer)


def end_tokens(model: Phi3ForCausalLM, tokenizer: Phi3Tokenizer) -> list[int]:
    """Returns the end tokens of the config and those that the tokenizer has."""
    ids = (tokenizer.convert_tokens_to_ids([token])[0] for token in TURN_ENDS)
    known = {id for id in ids if id is not None and id != tokenizer.unk_token_id}
    return sorted({*model.config.eos_token_ids, *known})
