"""A tiny chat model on disk: random weights, a byte-level tokenizer and a template."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from reference import small_config, write_random_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PROMPT = "What is the capital of France?"
NEVER = 299
"""A token of the model that the tokenizer lacks."""


def write_checkpoint(folder: Path, **changes: Any) -> None:
    """Writes a model of 300 tokens whose answers never end by themselves; `changes` are of its config.

    20 of its tokens have no text, and many others are parts of characters, so that its answers, encoded
    again, give other tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT] * 9, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    sizes = {"vocab_size": 300, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    write_random_model("causal", small_config(**sizes | changes), folder, seed=3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": NEVER}))


class Checkpoint:
    """A directory whose model transformers loads on first use; answers are stored under its contents."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def answer_key(self) -> Any:
        weights = {path.name: load_file(path) for path in self.folder.glob("*.safetensors")}
        return json.loads((self.folder / "config.json").read_text()), weights

    @cached_property
    def model(self) -> Any:
        import torch
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32
        ).eval()

    @cached_property
    def tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)
