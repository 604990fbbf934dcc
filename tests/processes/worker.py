"""Checks that two processes with two CPU devices each compute together what one device computes.

Run by `test_two_processes.py` in both processes: `worker.py FOLDER CHECK ...` writes each check's error, or
null, into FOLDER/{process}.json.
"""

import json
import os
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3Tokenizer
from phi3_jax.checkpoint import CheckpointError
from phi3_jax.generation import CompiledModel, stream_text, stream_tokens
from phi3_jax.generation.chat import ChatSession
from phi3_jax.model import saving
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import make_mesh

FOLDER = Path(sys.argv[1])
PLAIN, LONGROPE, SLIDING = FOLDER / "model", FOLDER / "longrope", FOLDER / "sliding"
MESHES = ("fsdp=4", "fsdp=2,tensor=2", "data=2,tensor=2", "context=2,tensor=2")
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@cache
def model(mesh: str | None, folder: Path = PLAIN) -> Any:
    """Returns the checkpoint over all devices, or whole on one device of this process."""
    return Phi3ForCausalLM.from_pretrained(folder, mesh=mesh and make_mesh(mesh))


@cache
def prompts(rows: int = 3, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of different lengths, padded on the left."""
    ids = np.random.default_rng(5).integers(4, 280, (rows, length))
    mask = np.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids, mask


def same(mesh: str, folder: Path = PLAIN, **options: Any) -> Any:
    """Checks that generate gives the same tokens on the mesh as on one device; returns the mesh's output."""
    options = {"max_new_tokens": 9, "do_sample": False} | options
    ours = [model(where, folder).generate(*prompts(), **options) for where in (mesh, None)]
    sequences = [np.asarray(getattr(one, "sequences", one)) for one in ours]
    np.testing.assert_array_equal(*sequences)
    return ours[0]


@check
def every_process_has_its_shard_of_the_parameters() -> None:
    for mesh in MESHES:
        for ours, whole in zip(jax.tree.leaves(model(mesh)), jax.tree.leaves(model(None)), strict=True):
            assert len(ours.sharding.device_set) == 4
            for shard in ours.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(model("fsdp=4")) for shard in leaf.addressable_shards
    )
    assert held < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(model(None)))


@check
def logits_match_one_device() -> None:
    ids, mask = (np.resize(x, (4, 8)) for x in prompts())
    forward = jax.jit(lambda model, ids, mask: model(ids, mask).logits)
    expected = np.asarray(forward(model(None), ids, mask))
    for mesh in MESHES:
        gathered = jax.jit(
            lambda m: forward(m, ids, mask), out_shardings=jax.NamedSharding(make_mesh(mesh), jax.P())
        )
        np.testing.assert_allclose(gathered(model(mesh)), expected, atol=1e-5 * np.abs(expected).max())


@check
def greedy() -> None:
    same("fsdp=2,tensor=2")


@check
def greedy_on_the_other_meshes() -> None:
    for mesh in MESHES:
        same(mesh)


@check
def sampling_and_a_seed_of_process_0() -> None:
    same("fsdp=2,tensor=2", do_sample=True, seed=3, num_return_sequences=2, temperature=2.0, top_p=0.9)
    drawn = model("fsdp=4").generate(*prompts(), do_sample=True, temperature=5.0, max_new_tokens=9)
    theirs = distributed.broadcast(np.asarray(drawn), source=1)
    np.testing.assert_array_equal(drawn, theirs)


@check
def beams() -> None:
    same("data=2,tensor=2", num_beams=3, num_return_sequences=2)
    same("fsdp=4", num_beams=2, do_sample=True, seed=1, return_dict_in_generate=True, output_scores=True)


@check
def drafts() -> None:
    same("fsdp=2,tensor=2", prompt_lookup_num_tokens=3)
    for mesh in ("data=2,tensor=2", None):
        one = model(mesh).generate(*prompts(), max_new_tokens=9, do_sample=False, assistant_model=model(mesh))
        np.testing.assert_array_equal(
            one, model(None).generate(*prompts(), max_new_tokens=9, do_sample=False)
        )
    with pytest.raises(ValueError, match="another mesh"):
        same("fsdp=4", assistant_model=model(None))


@check
def guidance() -> None:
    same("data=2,tensor=2", guidance_scale=1.7, negative_prompt_ids=np.array([[7, 8, 9]]))


@check
def int8_cache() -> None:
    ours = model("context=2,tensor=2").generate(
        *prompts(), cache_implementation="quantized", max_new_tokens=4, do_sample=False
    )
    assert ours.shape == (3, 15)


@check
def sliding_cache_slides() -> None:
    options = {"cache_implementation": "sliding_window", "max_new_tokens": 20}
    same("data=2,tensor=2", SLIDING, **options)
    same("fsdp=4", SLIDING, **options)


@check
def resumes_from_a_returned_cache() -> None:
    for mesh in MESHES:
        first = same(mesh, return_dict_in_generate=True)
        ids = np.asarray(first.sequences)
        mask = np.concatenate([prompts()[1], np.ones((3, ids.shape[1] - 11), int)], axis=1)
        options = {"max_new_tokens": 5, "do_sample": False}
        again = model(mesh).generate(ids, mask, past_key_values=first.past_key_values, **options)
        np.testing.assert_array_equal(again, model(None).generate(ids, mask, **options))


@check
def longrope_crosses_in_a_batch() -> None:
    for mesh in ("fsdp=4", "data=2,tensor=2", "context=2,tensor=2"):
        same(mesh, LONGROPE, max_new_tokens=24)


@check
def outputs_can_be_read() -> None:
    names = ("scores", "logits", "attentions", "hidden_states")
    options = {f"output_{name}": True for name in names} | {"return_dict_in_generate": True}
    ours = same("fsdp=2,tensor=2", **options)
    theirs = model(None).generate(*prompts(), max_new_tokens=9, do_sample=False, **options)
    for name in names:
        for a, b in zip(*(jax.tree.leaves(getattr(one, name)) for one in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@check
def processors_and_criteria_on_the_host() -> None:
    def forbid(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[:, ids[:, -1]] = -np.inf
        return scores

    same("data=2,tensor=2", logits_processor=[forbid])
    same("fsdp=4", logits_processor=[forbid], num_beams=2)

    calls = []

    def long_enough(ids: np.ndarray, scores: Any) -> bool:
        calls.append(ids.shape)
        return ids.shape[1] >= 11 + 4

    options = {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": [long_enough]}
    out = model("fsdp=2,tensor=2").generate(*prompts(), **options)
    assert out.shape == (3, 15)
    assert bool(calls) == distributed.is_primary()
    options |= {"num_beams": 2}
    assert model("fsdp=2,tensor=2").generate(*prompts(), **options).shape == (3, 15)


@check
def process_0_decides_when_time_is_up() -> None:
    limit = 1e-9 if distributed.is_primary() else 1e9
    ids, _ = prompts()
    out = model("fsdp=4").generate(ids, max_new_tokens=30, do_sample=False, max_time=limit)
    assert out.shape == (3, 12)


@check
def streams_and_streamers() -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(PLAIN)
    ids = prompts()[0][0].tolist()
    options = {"max_new_tokens": 12, "do_sample": False}
    tokens = [list(stream_tokens(model(mesh), ids, **options)) for mesh in ("fsdp=4", None)]
    assert tokens[0] == tokens[1]
    texts = ["".join(stream_text(model(mesh), tokenizer, "Hello", **options)) for mesh in ("fsdp=4", None)]
    assert texts[0] == texts[1]


@check
def chat_sessions() -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(PLAIN)
    sessions = [
        ChatSession(CompiledModel(model(mesh)), tokenizer, max_new_tokens=7, do_sample=False)
        for mesh in ("fsdp=2,tensor=2", None)
    ]
    for text in ("Hello", "And then?"):
        answers = ["".join(session.reply(text)) for session in sessions]
        assert answers[0] == answers[1]
    assert sessions[0].last == sessions[1].last
    file = FOLDER / "conversation.json"
    sessions[0].save(file)
    assert json.loads(file.read_text())["messages"] == sessions[1].messages
    mine = file if distributed.is_primary() else FOLDER / "absent.json"  # only process 0 needs it
    sessions[0].reset()
    sessions[0].load(mine)
    assert sessions[0].messages == sessions[1].messages
    assert "".join(sessions[0].reply("So?")) == "".join(sessions[1].reply("So?"))


@check
def saves_what_it_loaded() -> None:
    for mesh in MESHES:
        target = FOLDER / "saved" / mesh
        model(mesh).save_pretrained(target, max_shard_size="100KB")
        distributed.from_primary(lambda target=target: assert_same_files(target, FOLDER / "expected"))


def assert_same_files(folder: Path, expected: Path) -> None:
    files = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == files
    for name in files:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


@check
def errors_of_process_0_reach_all() -> None:
    (FOLDER / "in the way").touch()
    with pytest.raises(CheckpointError, match="a file of that name"):
        model("fsdp=4").save_pretrained(FOLDER / "in the way")

    def fail(process: int) -> None:
        if distributed.process_index() == process:
            raise FileNotFoundError(2, "No such file", "a" * 400)

    for process in (0, 1):
        with pytest.raises(FileNotFoundError) as error:
            distributed.run_everywhere(partial(fail, process))
        assert error.value.filename == "a" * 400
    assert (
        distributed.run_everywhere(lambda: 7 + distributed.process_index()) == 7 + distributed.process_index()
    )


@check
def reports_a_full_disk() -> None:
    def full(source: Any, *_: Any) -> None:
        source.read(source.names()[0])
        raise OSError(28, "No space left on device")

    with (
        unittest.mock.patch.object(saving, "write_tensors", full),
        pytest.raises(CheckpointError, match="no space left"),
    ):
        model("fsdp=4").save_pretrained(FOLDER / "full")
    assert not (FOLDER / "full").exists()


@check
def a_new_head_is_divided() -> None:
    options = {"num_labels": 5, "rngs": 4}
    ours = Phi3ForSequenceClassification.from_pretrained(PLAIN, mesh=make_mesh("fsdp=4"), **options)
    whole = Phi3ForSequenceClassification.from_pretrained(PLAIN, **options)
    (shard, _) = ours.score.weight[...].addressable_shards
    assert shard.data.shape == (5, 12)
    np.testing.assert_allclose(shard.data, np.asarray(whole.score.weight[...])[shard.index], rtol=1e-6)


@check
def rejects_sizes_that_do_not_divide_before_it_reads() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=2 does not divide over tensor=4"):
        Phi3ForCausalLM.from_pretrained(PLAIN, mesh=make_mesh("tensor=4"))


@check
def long_values_are_broadcast() -> None:
    for size in (0, 200, 248, 249, 5000):
        value = "x" * size
        assert distributed.from_primary(lambda value=value: value) == value
    assert jnp.ones(3).is_fully_addressable


def main() -> None:
    distributed.start(60)
    assert jax.device_count() == 4
    assert jax.local_device_count() == 2
    results: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        if name not in sys.argv[2:]:
            continue
        begin = time.monotonic()
        try:
            function()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
        (FOLDER / f"{distributed.process_index()}.json").write_text(json.dumps(results))
        if results[name] is not None:
            os._exit(1)


if __name__ == "__main__":
    main()
