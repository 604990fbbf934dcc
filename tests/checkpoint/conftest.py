"""Fixtures of checkpoints."""

from pathlib import Path

import pytest
from gguf_files import stored_layout, weights, write_gguf


@pytest.fixture
def llama_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", "llama", stored_layout(weights(fused=False)))
