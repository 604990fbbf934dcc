"""Loading needs memory for the parameters and one tensor, converting for one tensor."""

import json
import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from reference import small_config
from safetensors.numpy import save_file

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model.saving import ModelSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# Mapped pages of a file count too.
MEASURE = """
import json, sys
import jax
from phi3_jax import Phi3ForCausalLM, convert_checkpoint

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

jax.block_until_ready(jax.numpy.zeros(8) + 1)
before, size = status("VmHWM:"), 0
model, quantization, *out = sys.argv[1:]
if out:
    convert_checkpoint(model, *out)
else:
    model = Phi3ForCausalLM.from_pretrained(model, quantization=quantization)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print(json.dumps([status("VmHWM:") - before, size]))
"""


def measure(model: Path, quantization: str = "none", *out: Path) -> tuple[int, int]:
    """Returns the peak in bytes, without the imports, and the bytes of the parameters."""
    command = [sys.executable, "-c", MEASURE, str(model), quantization, *map(str, out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = json.loads(done.stdout)
    return peak, size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 435 MB of random bfloat16, a fifth of it the embedding, with 8 tensors in a shard."""
    folder = tmp_path_factory.mktemp("large")
    config = small_config(
        vocab_size=45_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    source = ModelSource(nnx.eval_shape(lambda: Phi3ForCausalLM(config)))
    rng = np.random.default_rng(0)
    weight_map, names = {}, list(source.names())
    for start in range(0, len(names), 8):
        file = f"part-{start}.safetensors"
        tensors = {
            name: rng.integers(0, 2**14, math.prod(source.shape(name)), np.uint16)
            .view(ml_dtypes.bfloat16)
            .reshape(source.shape(name))
            for name in names[start : start + 8]
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    return folder


def test_loading_takes_little_more_than_the_parameters(folder: Path) -> None:
    peak, size = measure(folder)
    assert 300e6 < size < 600e6
    assert size <= peak <= 1.3 * size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of parameters"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_loading_rounded_weights_takes_little_more_than_these(folder: Path, quantization: str) -> None:
    peak, size = measure(folder, quantization)
    assert 100e6 < size < 320e6
    assert size <= peak <= 1.3 * size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of parameters"


def test_converting_holds_one_tensor(folder: Path, tmp_path: Path) -> None:
    peak, _ = measure(folder, "none", tmp_path / "out")
    largest = 45_000 * 1024 * 2
    assert peak <= 1.5 * largest, f"{peak / 1e6:.0f} MB for tensors of at most {largest / 1e6:.0f} MB"
