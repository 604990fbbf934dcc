"""Tests the commands `phi3-jax rope export` and `phi3-jax rope import`."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from gguf_files import byte_level, stored_layout, weights, write_gguf
from rope_cases import LISTS, rope_config
from stores import open_store

from phi3_jax import Phi3Config
from phi3_jax.checkpoint.gguf import GGUFSource


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory, of which nothing but the config is there."""
    folder = tmp_path / "model"
    rope_config("default").save_pretrained(folder)
    return folder


@pytest.fixture
def llama_file(tmp_path: Path) -> Path:
    tensors = stored_layout(weights(fused=False))
    return write_gguf(tmp_path / "llama.gguf", "llama", tensors, tokenizer=byte_level("smollm"))


def test_exports_for_transformers(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "factors.json").write_text(json.dumps({**LISTS, "factor": 4}))
    rope = f"longrope:@{tmp_path / 'factors.json'}"
    result = run("rope", "export", "--format", "transformers", "--model", model, "--rope", rope)
    assert result.code == 0, result.err
    fields = json.loads(result.out)
    assert fields["rope_scaling"] == {"type": "longrope", **LISTS}
    assert (fields["max_position_embeddings"], fields["original_max_position_embeddings"]) == (1024, 256)
    assert fields["rope_theta"] == 50000.0
    assert not result.err


def test_exports_the_models_own_rope_for_llama(run: Any, tmp_path: Path) -> None:
    """The model may be a config.json, and its model_type decides the spelling."""
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("rope", "export", "--format", "transformers", "--model", tmp_path / "config.json")
    assert json.loads(result.out)["rope_scaling"] == {"rope_type": "dynamic", "factor": 3.0}


def test_a_directory_with_a_gguf_file_has_its_architecture(run: Any, model: Path, llama_file: Path) -> None:
    llama_file.rename(model / llama_file.name)
    result = run("rope", "export", "--format", "transformers", "--model", model, "--rope", "linear:factor=2")
    assert json.loads(result.out)["rope_scaling"] == {"rope_type": "linear", "factor": 2}


def test_says_what_transformers_4_refuses(run: Any, model: Path) -> None:
    export = ["rope", "export", "--format", "transformers", "--model", model, "--rope", "yarn:factor=4"]
    assert "transformers 4 refuses the attention_factor" in run(*export).err
    assert not run(*export, "--model-type", "llama").err


def test_exports_for_vllm(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "factors.json").write_text(json.dumps({**LISTS, "factor": 4}))
    output, rope = tmp_path / "overrides.json", f"longrope:@{tmp_path / 'factors.json'}"
    result = run("rope", "export", "--format", "vllm", "--model", model, "--rope", rope, "--output", output)
    assert result.out == f"{output}\n"
    overrides = json.loads(output.read_text())
    command, note = result.err.splitlines()
    assert shlex.split(command)[:5] == ["vllm", "serve", str(model), "--max-model-len", "1024"]
    assert json.loads(shlex.split(command)[6]) == overrides
    assert note == "vLLM uses the long list for all texts; for the short one, serve with --max-model-len 256"


def test_exports_a_copy_of_a_model_and_reads_it(run: Any, llama_file: Path, tmp_path: Path) -> None:
    copy, factors = tmp_path / "copy.gguf", tmp_path / "factors.json"
    rope = "llama3:factor=8,low_freq_factor=1,high_freq_factor=4"
    result = run("rope", "export", "--format", "gguf", "--gguf", llama_file, "--rope", rope, "--output", copy)
    assert result.out == f"{copy}: the model with rope of llama, rope_freqs.weight\n", result.err
    config = Phi3Config.from_dict(GGUFSource(copy).config_dict())
    assert config.max_position_embeddings == 8 * 256
    result = run("rope", "import", copy, "--output", factors)
    assert result.out == (
        f"{factors}: longrope, original length 256, context 2,048, attention factor 1.0000\n"
    )
    assert run("rope", "import", copy).out == factors.read_text()
    assert json.loads(factors.read_text())["long_factor"] == list(
        dict(config.rope_scaling.parameters)["long_factor"]
    )


def test_a_rope_goes_through_a_store(run: Any, model: Path) -> None:
    with open_store("memory") as bucket:
        url = bucket.empty_folder().url
        export = ["rope", "export", "--model", model, "--rope", "linear:factor=4"]
        assert run(*export, "--format", "gguf", "--output", f"{url}/rope.gguf").code == 0
        result = run("rope", "import", f"{url}/rope.gguf", "--output", f"{url}/factors.json")
        assert "linear, original length 256, context 1,024" in result.out
        assert (
            run("rope", "import", f"{url}/factors.json").out == run("rope", "import", f"{url}/rope.gguf").out
        )


@pytest.mark.slow  # compilation
def test_generate_takes_an_exported_model(run: Any, llama_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    export = ["rope", "export", "--format", "gguf", "--gguf", llama_file, "--output", copy]
    assert run(*export, "--rope", "linear:factor=4").code == 0
    answers = [
        run(
            "generate",
            "ab 12 ab123 'sA ab",
            "--raw",
            "--max-new-tokens",
            8,
            "--dtype",
            "float32",
            "--model",
            *options,
        ).out
        for options in ([copy], [llama_file, "--rope", "linear:factor=4"], [llama_file])
    ]
    assert answers[0] == answers[1] != answers[2]


def test_says_when_llama_cpp_uses_the_long_list(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "factors.json").write_text(json.dumps({**LISTS, "factor": 4}))
    output, rope = tmp_path / "rope.gguf", f"longrope:@{tmp_path / 'factors.json'}"
    result = run("rope", "export", "--format", "gguf", "--model", model, "--rope", rope, "--output", output)
    assert result.out == f"{output}: rope of phi3, rope_factors_long.weight, rope_factors_short.weight\n"
    assert (
        result.err == "llama.cpp uses the long list for all texts if its context (-c) is above 256 tokens\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "--format gguf needs --output FILE.gguf"),
        (["--format", "gguf", "--output", "rope.json"], "--format gguf needs --output FILE.gguf"),
        (["--format", "vllm", "--gguf", "llama.gguf"], "--gguf does nothing with --format vllm"),
        (["--format", "gguf", "--gguf", "llama.gguf", "--output", "llama.gguf"], "--output llama.gguf is"),
        (["--format", "transformers", "--model", "nothing"], "there is no config at nothing"),
        (["--format", "transformers", "--rope", "yarn:factor=4,initial_tokens=3"], "needs initial_tokens=0"),
        (["--format", "transformers", "--output", "model/config.json"], "--output model/config.json is"),
        (["--format", "gguf", "--rope", "dynamic:factor=4", "--output", "x.gguf"], "'dynamic' changes"),
    ],
)
@pytest.mark.usefixtures("llama_file")
def test_rejects_before_anything_is_written(
    run: Any, model: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = [] if "--model" in options or "--gguf" in options else ["--model", model.name]
    result = run("rope", "export", *options, *given)
    assert result.code == 1
    assert message in result.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_import_does_not_write_over_its_file(run: Any, model: Path) -> None:
    config = model / "config.json"
    result = run("rope", "import", config, "--output", config)
    assert (result.code, "is also FILE" in result.err) == (1, True)
