"""SmolLM2-135M-Instruct on a novel: perplexities under several ropes, compared with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from their_perplexity import recipe, slide

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint import convert_checkpoint
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation import Scorer, perplexity
from phi3_jax.evaluation.scorer import frequencies_for

pytestmark = [pytest.mark.slow, pytest.mark.optimized, pytest.mark.usefixtures("torch_threads")]

LENGTH, STRIDE, TOKENS = 600, 410, 900
"""Windows are not multiples of the chunk, and the last one is shorter."""


@pytest.fixture(scope="module")
def models(shared_data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a scorer, transformers' model, and the tokens."""
    import torch
    import transformers

    try:
        folder = default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is not available: {error}")
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array(Phi3Tokenizer.from_pretrained(folder).encode(text[:12000])[:TOKENS])
    ours = Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    floats = tmp_path_factory.mktemp("floats") / "model"
    convert_checkpoint(folder, floats)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    return Scorer(ours), theirs, ids


@pytest.mark.parametrize(
    "rope",
    [
        "none",
        "linear:factor=4",
        "dynamic:factor=4,original_max_position_embeddings=256",
        "yarn:factor=4",
        "longrope:@factors.json",
    ],
)
def test_matches_transformers(
    models: Any, rope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factors = [1 + index * index / 200 for index in range(32)]
    Path("factors.json").write_text(
        f'{{"factors": {factors}, "original_max_position_embeddings": 500, "factor": 8}}'
    )
    scorer, theirs, ids = models
    config = parse_rope(rope).apply(scorer.config)
    ours = perplexity(scorer, ids, config, length=LENGTH, stride=STRIDE)
    loss, tokens = recipe(
        theirs, ids, *slide(len(ids), LENGTH, STRIDE, lambda window: frequencies_for(config, window))
    )
    assert ours.tokens == tokens == TOKENS - 1
    print(rope, ours.perplexity, np.exp(loss / tokens))
    assert ours.perplexity == pytest.approx(np.exp(loss / tokens), rel=1e-4)
