"""Loading a model or converting a checkpoint reads each file once, and with few libraries."""

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3ForCausalLM, convert_checkpoint
from phi3_jax.checkpoint import safetensors
from phi3_jax.pipeline import Pipeline

counters: list[Counter[str]] = []


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if counters and event == "open" and isinstance(arguments[0], str):
        counters[-1][Path(arguments[0]).name] += 1


sys.addaudithook(_count)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the openings of each file, and the readings of each header of safetensors."""
    safe_open = safetensors.safe_open

    def count_header(path: Path, **options: str) -> object:
        counters[-1][f"header of {path.name}"] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", count_header)
    counters.append(Counter())
    yield counters[-1]
    counters.pop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer, in several shards."""
    (tmp_path / "whole").mkdir()
    write_checkpoint(tmp_path / "whole")
    convert_checkpoint(tmp_path / "whole", tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def test_pipeline_reads_each_file_once(folder: Path, opened: Counter[str]) -> None:
    Pipeline.load(folder, dtype="float32")
    shards = [path.name for path in folder.glob("*.safetensors")]
    assert len(shards) > 1
    assert all(opened[f"header of {name}"] == 1 for name in shards)
    assert {name: opened[name] for name in opened if name.endswith(".json")} == {
        path.name: 1 for path in folder.glob("*.json")
    }


def test_conversion_reads_each_file_once(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    convert_checkpoint(folder, tmp_path / "out")
    assert all(opened[f"header of {path.name}"] == 1 for path in folder.glob("*.safetensors"))
    # Once in the source, and twice, under the same name, in the destination: written, and synced to the disk.
    companions = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert [opened[name] for name in companions] == [3, 3, 3]
    assert (opened["config.json"], opened["model.safetensors.index.json"]) == (2, 1)


LIBRARY = """
    import sys
    import flax.nnx, jax, jaxtyping, optax  # they may import what they like

    blocked = "gguf platformdirs psutil rich typer grain orbax pydantic yaml"
    sys.modules |= dict.fromkeys(blocked.split())

    import numpy as np
    import phi3_jax

    source, destination = sys.argv[1:]
    ids = np.array([[5, 6, 7]], np.int32)
    for folder in (source, destination):
        model = phi3_jax.Phi3ForCausalLM.from_pretrained(folder)
        print(model(ids).logits.shape, model.generate(ids, max_new_tokens=2).shape)
        phi3_jax.convert_checkpoint(source, destination)
"""


def test_library_needs_few_packages(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_checkpoint(tmp_path / "source")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(LIBRARY),
        str(tmp_path / "source"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3, 300) (1, 5)"] * 2
    assert Phi3ForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 300
