"""Two processes read a model from a store: together each byte once, and each its share."""

import json
from pathlib import Path

import pytest
from pair import run_pair
from small_checkpoint import write_checkpoint
from stores import open_store

pytestmark = [pytest.mark.slow, pytest.mark.processes]

LOAD = """
import json, sys
import jax
import numpy as np
from phi3_jax import Phi3ForCausalLM
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.checkpoint import safetensors
from phi3_jax.storage.objects import RemoteFile

safetensors.HEADER_BLOCK = 1 << 12  # the file is smaller than what is read of others at first
read, count = RemoteFile.read, 0

def counting(file, pieces):
    global count
    count += sum(len(memory) for _, memory in pieces)
    read(file, pieces)

RemoteFile.read = counting
url, folder = sys.argv[1:]
distributed.start(60)
whole = jax.tree.leaves(Phi3ForCausalLM.from_pretrained(folder))
counts = []
for mesh in ("fsdp=4", "fsdp=2,tensor=2", "data=2,tensor=2"):
    count = 0
    divided = jax.tree.leaves(Phi3ForCausalLM.from_pretrained(url, mesh=make_mesh(mesh)))
    for ours, expected in zip(divided, whole, strict=True):
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    counts.append(count)
print()
print(json.dumps(counts))
"""

FAIL = """
import sys
from phi3_jax import Phi3ForCausalLM
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.storage.objects import RemoteFile
from phi3_jax.storage.urls import StorageError

distributed.start(60)
if distributed.process_index() == 1:
    read, calls = RemoteFile.read, 0

    def failing(file, pieces):
        global calls
        calls += 1
        if calls == 4:
            raise StorageError("the store fails")
        read(file, pieces)

    RemoteFile.read = failing
try:
    distributed.run_everywhere(lambda: Phi3ForCausalLM.from_pretrained(sys.argv[1], mesh=make_mesh("fsdp=4")))
except StorageError as error:
    print("caught", error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder)
    return folder


def test_each_process_reads_its_share(folder: Path, tmp_path: Path) -> None:
    with open_store("gs") as store:
        url = store.put_folder("model", folder)
        assert store.proxy is not None
        store.proxy.requests.clear()
        command = ["-c", LOAD, url, folder]
        cache = {"PHI3_JAX_CACHE": str(tmp_path / "cache")}
        ended = run_pair(command, command, logs=tmp_path, timeout=240, environment=cache)
        requests = store.proxy.requests
    assert [each.code for each in ended] == [0, 0], ended
    size = (folder / "model.safetensors").stat().st_size
    both = 2 * (1 << 13)  # both read the header
    for counts in zip(*(json.loads(each.out.splitlines()[-1]) for each in ended), strict=True):
        assert max(counts) < 0.6 * size
        assert size <= sum(counts) <= size + both
    served = sum(each.bytes for each in requests if "safetensors" in each.path and "media" in each.path)
    assert 3 * size <= served <= 3 * (size + both)


def test_an_error_in_one_process_ends_both(folder: Path, tmp_path: Path) -> None:
    with open_store("gs") as store:
        command = ["-c", FAIL, store.put_folder("model", folder)]
        cache = {"PHI3_JAX_CACHE": str(tmp_path / "cache")}
        ended = run_pair(command, command, logs=tmp_path, timeout=240, environment=cache)
    assert all("caught the store fails" in each.out for each in ended), ended
