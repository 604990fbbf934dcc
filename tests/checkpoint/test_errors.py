"""Errors of a checkpoint are plain and come before memory is spent; writing is all or nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jax
import numpy as np
import pytest
from marks import slow
from reference import small_config
from safetensors.numpy import load_file, save_file

from phi3_jax import (
    CheckpointError,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3Model,
    convert_checkpoint,
)
from phi3_jax.model.loading import load_model
from phi3_jax.model.saving import ModelSource

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of one file."""
    Phi3ForCausalLM(small_config(num_hidden_layers=3)).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint of several shards."""
    model = Phi3ForCausalLM(small_config(num_hidden_layers=3))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


@pytest.fixture
def nothing_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that puts anything on a device."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a tensor was put on a device")

    monkeypatch.setattr(jax, "device_put", refuse)


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def assert_rejected(folder: Path, *parts: str, cls: type = Phi3ForCausalLM, **options: Any) -> None:
    """Checks that loading raises a CheckpointError of one line with all `parts` in it."""
    with pytest.raises(CheckpointError) as caught:
        load_model(cls, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Reading.

pytestmark_reading = pytest.mark.usefixtures("nothing_on_device")


@pytestmark_reading
def test_rejects_paths_that_are_not_checkpoints(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_rejected(empty, f"{empty} is not a checkpoint", "config.json")
    assert_rejected(tmp_path / "absent", "absent")
    assert_rejected(folder / "model.safetensors", "model.safetensors", "director")
    assert_rejected(folder / "config.json", "config.json", "director")
    for wrong in (folder / "model.safetensors", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"name its directory|does not exist"):
            convert_checkpoint(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytestmark_reading
def test_rejects_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_rejected(folder, "neither model.safetensors nor", "pytorch_model.bin", "save them as safetensors")


@pytestmark_reading
def test_rejects_a_missing_broken_or_foreign_config(folder: Path) -> None:
    file = folder / "config.json"
    good = file.read_text()
    for text, parts in {
        good[:40]: ["config.json is not valid JSON", "line"],
        "[]": ["config.json", "holds a list"],
        "\xff\xfe": ["config.json"],
        good.replace('"phi3"', '"qwen2"'): ["config.json", "model_type='qwen2'", "supported: 'phi3'"],
        good.replace('"hidden_size": 48', '"hidden_size": -1'): ["config.json", "hidden_size=-1"],
    }.items():
        file.write_text(text, encoding="latin-1")
        assert_rejected(folder, *parts)
    file.unlink()
    assert_rejected(folder, f"no config at {file}")


@pytestmark_reading
@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_rejects_missing_tensors(request: pytest.FixtureRequest, layout: str) -> None:
    path = request.getfixturevalue(layout)
    assert_rejected(
        path,
        str(path),
        "does not fit Phi3ForCausalLM",
        "4 layers",
        "missing: model.layers.3.input_layernorm.weight",
        num_hidden_layers=4,
    )


@pytestmark_reading
def test_rejects_one_missing_or_unexpected_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    rewrite(file, lambda found: found.pop(NORM))
    assert_rejected(folder, f"missing: {NORM}")
    rewrite(
        file, lambda found: found.update({NORM: np.ones(48, np.float32), "model.x": np.ones(1, np.float32)})
    )
    assert_rejected(folder, "unexpected: model.x")
    rewrite(file, lambda found: found.update({"model.layers.3.mlp.down_proj.weight": found.pop("model.x")}))
    assert_rejected(folder, "unexpected: model.layers.3.mlp.down_proj.weight", "3 layers")


@pytestmark_reading
def test_rejects_wrong_shapes(folder: Path) -> None:
    name = "model.layers.1.self_attn.qkv_proj.weight"
    file = folder / "model.safetensors"
    rewrite(file, lambda found: found.update({name: found[name].T.copy(), NORM: np.ones(47, np.float32)}))
    assert_rejected(
        folder,
        f"{name} has shape [48, 96], expected [96, 48]",
        f"{NORM} has shape [47], expected [48]",
    )
    rewrite(file, lambda found: found.update({name: np.ones((0, 48), np.float32)}))
    assert_rejected(folder, f"{name} has shape [0, 48], expected [96, 48]")
    rewrite(file, lambda found: found.update({name: np.ones((), np.float32)}))
    assert_rejected(folder, f"{name} has shape [], expected [96, 48]")


@pytestmark_reading
def test_counts_many_problems(folder: Path) -> None:
    assert_rejected(folder, "has shape", "and 17 more", hidden_size=96, head_dim=12)


@pytestmark_reading
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_rejects_tensors_that_are_not_floating_point(folder: Path, dtype: Any) -> None:
    file = folder / "model.safetensors"
    rewrite(file, lambda found: found.update({NORM: np.ones(48, dtype)}))
    assert_rejected(folder, str(file), NORM, "expected one of", "BF16")


@pytestmark_reading
@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (lambda size, header: 0, "empty"),
        (lambda size, header: 5, "in the header's length"),
        (lambda size, header: 8, "before the header"),
        (lambda size, header: header // 2, "in the header"),
        (lambda size, header: header, "before the data"),
        (lambda size, header: size // 2, "in the data"),
        (lambda size, header: size - 1, "at the last byte"),
        (lambda size, header: size + 3, "too long"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_rejects_truncated_files(
    request: pytest.FixtureRequest, layout: str, keep: Callable[[int, int], int], what: str
) -> None:
    path = request.getfixturevalue(layout)
    file = path / "model.safetensors" if layout == "folder" else shard_of(path, NORM)
    content = file.read_bytes()
    length = keep(len(content), 8 + int.from_bytes(content[:8], "little"))
    file.write_bytes((content + b"\0" * 3)[:length])
    assert_rejected(path, str(file), f"({length} bytes)", "truncated or not a safetensors file")


@pytestmark_reading
def test_rejects_foreign_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    for content in (
        b"PK\3\4" + bytes(100),
        b"<!DOCTYPE html>" * 9,
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        file.write_bytes(content)
        assert_rejected(folder, str(file), "not a safetensors file")


@pytestmark_reading
def test_rejects_missing_shards(sharded: Path) -> None:
    file = shard_of(sharded, NORM)
    file.unlink()
    assert_rejected(sharded, str(sharded), f"lacks {file.name}, which {INDEX} names")


@pytestmark_reading
def test_rejects_an_index_with_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    file = shard_of(sharded, NORM)
    change_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.gone": file.name}))
    assert_rejected(sharded, f"{file} lacks model.gone, which {INDEX} places there")


@pytestmark_reading
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("\xff", "is not valid UTF-8"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "places a in 1; expected a file beside the index"),
        ('{"weight_map": {"a": ""}}', "places a in ''"),
        ('{"weight_map": {"a": ".."}}', "places a in '..'"),
        ('{"weight_map": {"a": "../good/model.safetensors"}}', "places a in '../good/model.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "places a in '/etc/passwd'"),
        ('{"weight_map": {"a": "sub/x.safetensors"}}', "places a in 'sub/x.safetensors'"),
        ('{"weight_map": {"a": "x\\u0000"}}', "lacks x"),
    ],
)
def test_rejects_a_broken_index(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    assert_rejected(sharded, INDEX, message)


@pytestmark_reading
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "nonsense", "1e-45", int, 3])
def test_rejects_dtypes_that_parameters_cannot_have(folder: Path, tmp_path: Path, dtype: Any) -> None:
    for use in (
        lambda: Phi3ForCausalLM.from_pretrained(folder, dtype=dtype),
        lambda: convert_checkpoint(folder, tmp_path / "out", dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"dtype=.* cannot be .*; use float32, bfloat16, float16"):
            use()
    assert not (tmp_path / "out").exists()


@pytestmark_reading
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"device_map": "auto"}, ValueError, "device_map='auto' is not supported; pass mesh=make_mesh"),
        ({"load_in_4bit": True}, ValueError, "load_in_4bit=True is not supported"),
        ({"subfolder": "model"}, ValueError, "subfolder='model' is not supported"),
        ({"num_lables": 3}, TypeError, "no argument 'num_lables'; did you mean 'num_labels'"),
        ({"dytpe": "float32"}, TypeError, "did you mean 'dtype'"),
    ],
)
def test_rejects_arguments_that_are_not_supported(
    folder: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Phi3ForCausalLM.from_pretrained(folder, **options)


def test_accepts_arguments_of_transformers(folder: Path) -> None:
    model = Phi3ForCausalLM.from_pretrained(
        folder,
        torch_dtype="bfloat16",
        trust_remote_code=True,
        low_cpu_mem_usage=True,
        device_map=None,
        use_cache=False,
        use_safetensors=True,
    )
    assert model.dtype == "bfloat16"


@pytestmark_reading
def test_rejects_a_checkpoint_without_the_head(tmp_path: Path) -> None:
    Phi3ForSequenceClassification(small_config()).save_pretrained(tmp_path)
    assert_rejected(tmp_path, "missing: lm_head.weight")


# Writing.


def test_rejects_a_read_only_destination(folder: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    for write in (convert_checkpoint, lambda _, to: Phi3ForCausalLM(small_config()).save_pretrained(to)):
        for target in (closed, closed / "new"):
            with pytest.raises(
                CheckpointError, match=r"cannot be written: Permission denied; nothing was changed"
            ):
                write(folder, target)
    assert not list(closed.iterdir())


def test_rejects_impossible_destinations(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the destination's name is empty"):
        convert_checkpoint(folder, "")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="is the checkpoint itself; name another directory"):
        convert_checkpoint(folder, folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        convert_checkpoint(folder, tmp_path / "link")
    with pytest.raises(CheckpointError, match="is a file; name a directory"):
        convert_checkpoint(folder, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="there is a file of that name; nothing was changed"):
        Phi3ForCausalLM(small_config()).save_pretrained(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_checkpoint(folder, folder / "model.safetensors" / "below")
    with pytest.raises(ValueError, match="is not a size"):
        convert_checkpoint(folder, tmp_path / "out", max_shard_size="many")
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]


class _Full:
    """Stands in for a function whose n-th call fails with ENOSPC."""

    def __init__(self, function: Callable[..., Any], at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*arguments, **options)


def writers(source: Path) -> Iterator[Callable[[Path], None]]:
    yield lambda to: convert_checkpoint(source, to, max_shard_size="40KB")
    model = Phi3ForCausalLM.from_pretrained(source)
    yield lambda to: model.save_pretrained(to, max_shard_size="40KB")


@pytest.mark.parametrize("step", ["phi3_jax.checkpoint.safetensors.write_file", "os.replace"])
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    """The disk is full at the first file, at the last, and at each in between."""
    source, target = tmp_path / "source", tmp_path / "target"
    Phi3ForCausalLM(small_config(num_hidden_layers=1)).save_pretrained(source)
    Phi3ForCausalLM(small_config(), rngs=5).save_pretrained(target, max_shard_size="80KB")
    (target / "README.md").write_text("mine")
    if not existing:
        (target).rename(tmp_path / "unused")
    before = contents(tmp_path)
    module, _, name = step.rpartition(".")
    function = getattr(os, name) if module == "os" else getattr(sys.modules[module], name)
    for write in writers(source):
        failures = 0
        while True:
            full = _Full(function, failures + 1)
            monkeypatch.setattr(step, full)
            try:
                write(target)
            except CheckpointError as error:
                assert str(error) == (  # noqa: PT017
                    f"{target} cannot be written: there is no space left on the disk; nothing was changed"
                )
            else:
                break
            assert contents(tmp_path) == before
            assert not list(tmp_path.rglob(".*")), "an incomplete file is left"
            failures += 1
        assert failures >= (3 if existing or name == "write_file" else 1)
        monkeypatch.undo()
        Phi3ForCausalLM.from_pretrained(target)
        if not existing:
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
        else:
            Phi3ForCausalLM(small_config(), rngs=5).save_pretrained(target, max_shard_size="80KB")
        assert contents(tmp_path) == before


def test_real_full_disk_changes_nothing(tmp_path: Path, folder: Path) -> None:
    """The file system has room for half of the weights."""
    mount = tmp_path / "disk"
    mount.mkdir()
    size = (folder / "model.safetensors").stat().st_size
    command = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "none", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for target in (mount, mount / "new"):
            for limit in ("5GB", "20KB"):
                with pytest.raises(
                    CheckpointError, match=f"{target} cannot be written: there is no space left"
                ):
                    convert_checkpoint(folder, target, max_shard_size=limit)
                assert not list(mount.iterdir())
        with pytest.raises(CheckpointError, match="there is no space left"):
            Phi3ForCausalLM.from_pretrained(folder).save_pretrained(mount / "new")
        assert not list(mount.iterdir())
        Phi3Model(small_config(num_hidden_layers=1)).save_pretrained(mount)  # itself another file system
        Phi3Model.from_pretrained(mount)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("existing", [slow(False), True])
def test_killed_while_converting(tmp_path: Path, sharded: Path, existing: bool) -> None:
    """It is killed at the first shard, at the last, and while files move; no mix of two models results."""
    target = tmp_path / "target"
    if existing:
        Phi3ForCausalLM(small_config(), rngs=5).save_pretrained(target, max_shard_size="80KB")
        (target / "chat_template.jinja").write_text("of the old tokenizer")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from phi3_jax.checkpoint import convert_checkpoint, safetensors
        source, target = sys.argv[1:]
        for line in sys.stdin:
            step, number = line.split()
            module = safetensors if step == "write_file" else os
            function = getattr(module, step)
            calls = 0
            def stop(*arguments):
                global calls
                calls += 1
                if calls == int(number):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            child = os.fork()  # safe: JAX is imported, but not yet used
            if child == 0:
                setattr(module, step, stop)
                convert_checkpoint(source, target, max_shard_size="40KB")
                os._exit(0)
            print(os.waitpid(child, 0)[1], flush=True)
        """
    )
    before = contents(target) if existing else {}
    # config.json is written with one replace; then each old file moves out and each new one in.
    moments = [("write_file", 1), ("write_file", 5)]
    moments += [("replace", 4), ("replace", len(before) + 4)] if existing else []
    arguments = [sys.executable, "-c", script, str(sharded), str(target)]
    with subprocess.Popen(arguments, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for step, number in moments:
            process.stdin.write(f"{step} {number}\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == signal.SIGKILL
            if existing:
                assert (target / "config.json").exists() == (step == "write_file")
                Phi3ForCausalLM.from_pretrained(target)  # puts the old files back
                after = contents(target)
                assert {name: after[name] for name in after if name[0] != "."} == before
            else:
                assert not target.exists()
        convert_checkpoint(sharded, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded", "target"]
    assert sorted(contents(target)) == ["config.json", "generation_config.json", "model.safetensors"]


def test_interrupted_while_converting(tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_jax.checkpoint.safetensors.write_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(sharded, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_failed_read_while_saving_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Any, name: str) -> None:
        raise RuntimeError("device lost")

    model = Phi3ForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(ModelSource, "read", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        model.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
