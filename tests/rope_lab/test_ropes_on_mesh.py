"""Searches, critical pairs and retrieval tasks with a model on a mesh match those on one device."""

import random
from pathlib import Path
from typing import Any

import jax
import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import make_mesh
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.rope_lab.critical.run import find_critical_pair
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions
from phi3_jax.rope_lab.retrieval.run import run_retrieval
from phi3_jax.rope_lab.retrieval.tasks import make_tasks
from phi3_jax.rope_lab.search.evolution import Evolution
from phi3_jax.rope_lab.search.run import search_ropes

pytestmark = pytest.mark.slow

MESHES = [{"data": 2}, {"fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 320, "original_max_position_embeddings": 320}
    write_checkpoint(folder, num_hidden_layers=1, initializer_range=0.3, pad_token_id=0, **sizes)
    return folder


def mesh(axes: dict[str, int]) -> Any:
    return make_mesh(axes, jax.devices()[: 2 * len(axes)])


@pytest.mark.parametrize("axes", MESHES)
def test_search_matches_one_device(model: Path, axes: dict[str, int], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    draws = random.Random(3)
    text.write_text(" ".join(draws.choice(["What", "is", "the", "capital", "of", "x"]) for _ in range(600)))
    results = [
        search_ropes(
            model,
            text,
            tmp_path / name,
            objective=ObjectiveOptions("perplexity", (400,), needles=0),
            method=Evolution(population=6, iterations=1, parents=3),
            batch_size=3,
            dtype="float32",
            mesh=where,
            show=False,
        ).search.scored
        for name, where in (("one", None), ("mesh", mesh(axes)))
    ]
    assert [each.individual for each in results[0]] == [each.individual for each in results[1]]
    assert [each.perplexity for each in results[1]] == pytest.approx(
        [each.perplexity for each in results[0]], rel=1e-5
    )
    assert len({round(each.perplexity, 3) for each in results[0]}) == len(results[0]) == 9


@pytest.mark.parametrize("axes", MESHES)
def test_critical_pair_matches_one_device(model: Path, axes: dict[str, int], tmp_path: Path) -> None:
    """Three ropes at a time do not divide over two devices."""
    text = tmp_path / "text.txt"
    draws = random.Random(3)
    text.write_text(" ".join(draws.choice(["What", "is", "the", "capital", "of", "x."]) for _ in range(600)))
    results = [
        find_critical_pair(
            model,
            text,
            tmp_path / name,
            objective=ObjectiveOptions("needle", (400,), needles=1, samples=2),
            pairs=[3],
            batch_size=3,
            dtype="float32",
            mesh=where,
            show=False,
        )
        for name, where in (("one", None), ("mesh", mesh(axes)))
    ]
    one, other = ([*each.candidates, *each.known.values()] for each in results)
    assert [each.scaling for each in one] == [each.scaling for each in other]
    assert [each.perplexity for each in other] == pytest.approx([each.perplexity for each in one], rel=1e-5)
    assert results[1].effects[0] == pytest.approx(results[0].effects[0], rel=1e-5)
    assert len({round(each.perplexity, 3) for each in one}) == len(one) - 2  # linear and NTK are candidates


@pytest.mark.parametrize("axes", MESHES)
def test_retrieval_matches_one_device(model: Path, axes: dict[str, int], tmp_path: Path) -> None:
    results = [
        run_retrieval(
            model,
            tmp_path / name,
            [parse_rope("none"), parse_rope("yarn:factor=2")],
            tasks=make_tasks(["passkey", "multi-value"], keys=2),
            lengths=(450,),
            depths=(0.0, 1.0),
            trials=2,
            max_new_tokens=8,
            batch_size=3,
            dtype="float32",
            mesh=where,
            show=False,
        ).trials
        for name, where in (("one", None), ("mesh", mesh(axes)))
    ]
    assert results[0] == results[1]
    assert len({each.text for each in results[0]}) > 2
