"""`phi3-jax rope study`: its settings, and what it tells."""

import signal
from pathlib import Path
from typing import Any

import pytest
from phi3_jax.train.finetune import InterruptedRunError

from phi3_jax.cli import rope_study

SETTINGS = """
output_dir: out
text: book.txt
length: 256
trained: [none]
ropes: {none: none}
compare: {lengths: [64]}
"""


def test_tells_where_a_signal_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise InterruptedRunError(3, signal.SIGTERM, saved=True)

    (tmp_path / "study.yaml").write_text(SETTINGS)
    monkeypatch.setattr(rope_study, "run_study", interrupted)
    result = run("rope", "study", tmp_path / "study.yaml")
    assert result.code == 128 + signal.SIGTERM
    assert "interrupted after step 3, which is saved; the same command resumes" in result.err


def test_rejects_unknown_settings(tmp_path: Path, run: Any) -> None:
    (tmp_path / "study.yaml").write_text(SETTINGS.replace("length:", "lenght:"))
    result = run("rope", "study", tmp_path / "study.yaml")
    assert result.code == 1
    assert "there is no setting lenght; did you mean length?" in result.err
