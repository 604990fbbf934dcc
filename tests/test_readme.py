"""The README's Python examples, run as they stand on a tiny model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.rope_scaling import ROPE_TYPES

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the examples take for granted, and a folder for what they write."""
    folder = tmp_path / "model"
    folder.mkdir()
    alphabet = {token: i for i, token in enumerate(["<pad>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"pad_token": "<pad>", "padding_side": "left", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = small_config(vocab_size=len(alphabet), pad_token_id=0, max_position_embeddings=2048)
    model = Phi3ForCausalLM(config)
    model.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phi3_jax.rope_scaling.ROPE_TYPES", dict(ROPE_TYPES))
    return {
        "path": folder,
        "model": model,
        "tokenizer": Phi3Tokenizer.from_pretrained(folder),
        "text": "All happy families are alike. " * 40,
        "batch_size": 2,
        "prompt_ids": np.full((2, 5), 7),
        "ids": np.full((2, 5), 7),
        "np": np,
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number: int, surroundings: dict[str, Any]) -> None:
    exec(compile(BLOCKS[number], f"README example {number}", "exec"), surroundings)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 5
