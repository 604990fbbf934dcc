"""What a command writes is never what it reads, in a store as on a disk."""

from pathlib import Path

import pytest
from stores import Store

from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.fetch import fetch, fetch_folder


def test_rejects_urls_of_inputs(memory: Store) -> None:
    url = memory.put("in.txt", b"text")
    memory.put("model/config.json", b"{}")
    memory.put("model/weights.bin", b"0")
    model = fetch_folder(f"{memory.url}/model", remote=lambda name: name.endswith("bin"))
    inputs = {"--input": fetch(url), "--model": model, "--text": None}
    with pytest.raises(ValueError, match=r"^--output mem.*in\.txt is also --input; choose another --output$"):
        check_outputs({"--output": url}, inputs)
    for name in ("config.json", "weights.bin"):
        with pytest.raises(ValueError, match=r"is in --model; choose another --output"):
            check_outputs({"--output": f"{memory.url}/model/{name}"}, inputs)
    with pytest.raises(ValueError, match=r"model is also --model"):
        check_outputs({"--output": f"{memory.url}/model/"}, inputs)
    with pytest.raises(ValueError, match=r"--stats .* is also --output; choose another --stats"):
        check_outputs({"--output": f"{memory.url}/out", "--stats": f"{memory.url}/out"}, inputs)


def test_checks_local_outputs_beside_those_in_stores(memory: Store, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("text")
    check_outputs({"--output": f"{memory.url}/out", "--stats": tmp_path / "s.json"}, {"--input": path})
    with pytest.raises(ValueError, match=r"--stats .* is also --input"):
        check_outputs({"--output": f"{memory.url}/out", "--stats": path}, {"--input": path})
