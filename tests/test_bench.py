"""`phi3-jax bench`: what it counts, and one small run of both sides."""

import re
from pathlib import Path

import pytest
from reference import small_config

from phi3_jax import Phi3ForCausalLM, bench


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_a_step_are_those_of_the_weights_and_the_cache(dtype: str) -> None:
    config = small_config(head_dim=20)
    model = Phi3ForCausalLM(config, dtype=dtype)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    looked_up = config.vocab_size * config.hidden_size  # of the embedding a step reads a row
    width = model.dtype.itemsize
    weights = (model.num_parameters() - norms - looked_up) * width
    cache = model.init_cache(2, 10 + 4 // 2, dtype)
    cached = sum(slots.nbytes for slots in (*cache.keys, *cache.values))
    work = bench.Work(Path(), dtype, batch=2, prompt_tokens=10, new_tokens=4)
    assert bench._bytes_a_step(config, work) == weights + cached


@pytest.mark.slow
def test_both_sides_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Phi3ForCausalLM(small_config()).save_pretrained(tmp_path)
    bench.run_bench(
        str(tmp_path),
        layers=None,
        prompt_tokens=8,
        new_tokens=3,
        batch=2,
        rounds=2,
        dtype="bfloat16",
        cache_dir=None,
    )
    table = capsys.readouterr().out
    assert "phi3-jax" in table
    assert "transformers" in table
    for row in ("prefill, tokens/s", "decode, tokens/s"):
        assert re.search(rf"{row}\W+[\d,.]+\W+[\d,.]+\W+\d+\.\d\d\b", table), table


def test_layers_are_of_presets_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuts a preset"):
        bench.run_bench(
            str(tmp_path),
            layers=2,
            prompt_tokens=8,
            new_tokens=3,
            batch=1,
            rounds=1,
            dtype="float32",
            cache_dir=None,
        )
