"""Two processes that load a divided model: neither ever holds much more than its own part."""

import json
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from pair import run_pair
from reference import small_config
from safetensors.numpy import save_file

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model.saving import ModelSource

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEASURE = """
import json, sys
import jax
import phi3_jax.checkpoint  # otherwise the peak would count its modules
from phi3_jax import Phi3ForCausalLM
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import make_mesh

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

distributed.start(60)
distributed.broadcast(jax.device_count())
before = status("VmHWM:")
model = Phi3ForCausalLM.from_pretrained(sys.argv[1], mesh=make_mesh(sys.argv[2]))
peak = status("VmHWM:") - before
share = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print()
print(json.dumps([peak, share, whole]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 600 MB in bfloat16 with more in the layers than in the embedding."""
    folder = tmp_path_factory.mktemp("large")
    config = small_config(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    source = ModelSource(nnx.eval_shape(lambda: Phi3ForCausalLM(config)))
    numbers = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16).view(ml_dtypes.bfloat16)
    weight_map, names = {}, list(source.names())
    for start in range(0, len(names), 30):
        file = f"part-{start}.safetensors"
        tensors = {
            name: numbers[: math.prod(source.shape(name))].reshape(source.shape(name))
            for name in names[start : start + 30]
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,tensor=2", "tensor=4"])
def test_each_process_holds_its_share(folder: Path, mesh: str) -> None:
    command = ["-c", MEASURE, folder, mesh]
    for ended in run_pair(command, command, logs=folder, timeout=240):
        assert ended.code == 0, ended
        peak, share, whole = json.loads(ended.out.splitlines()[-1])
        assert 400e6 < whole < 900e6
        assert share < 0.6 * whole
        assert share <= peak <= 1.2 * share, f"{peak / 1e6:.0f} MB for a share of {share / 1e6:.0f} MB"
