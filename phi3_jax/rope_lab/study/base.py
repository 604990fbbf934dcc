"""A model from scratch: a tokenizer trained on a text, and random parameters."""

import json

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.rope_lab.study.settings import BaseSettings
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

END = "<|endoftext|>"
"""The only special token, of id 0."""


def write_new_model(output: Target, text: str, settings: BaseSettings, seed: int) -> None:
    """Writes a checkpoint of random parameters with a tokenizer of the text.

    Raises:
        UserError: the text has too few different words for the vocabulary.
    """
    tokenizer = _trained_tokenizer(text, settings.vocab_size)
    model = Phi3ForCausalLM(settings.phi3_config(), rngs=nnx.Rngs(seed), dtype=jnp.float32)
    model.save_pretrained(output)
    write_text(target_in(output, "tokenizer.json"), tokenizer.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": settings.length,
    }
    write_text(target_in(output, "tokenizer_config.json"), json.dumps(config, indent=2) + "\n")


def _trained_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer, which has a token for each digit, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"the training part of the text yields {size:,} tokens only; give base.vocab_size={size} or a "
            "longer text"
        )
    return tokenizer
