"""Objectives of experiments with ropes: their samples, values and parts, compared with transformers."""

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answers import stored
from reference import distance
from small_checkpoint import Checkpoint, write_checkpoint
from their_perplexity import patch

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.rope_lab.objectives.needles import NeedleTexts, needle_objective
from phi3_jax.rope_lab.objectives.objectives import (
    RopeObjective,
    Sample,
    ScoredRope,
    measure,
    perplexity_objective,
    spread,
)
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions

FACTORS = (1.0, 1.3, 1.7, 2.0, 2.6, 3.0)
LENGTHS = (384, 512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, initializer_range=0.2, pad_token_id=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def text() -> str:
    draws = random.Random(3)
    words = ["What", "is", "the", "capital", "of", "x"]
    return ". ".join(" ".join(draws.choice(words) for _ in range(7)) for _ in range(200))


@pytest.fixture(scope="module")
def objective(tokenizer: Phi3Tokenizer, text: str) -> RopeObjective:
    tokens = np.array(tokenizer.encode(text))
    return needle_objective(tokenizer, tokens, LENGTHS, (1.0, 3.0), needles=2, samples=2, seed=5)


@stored
def losses_of_theirs(
    theirs: Checkpoint, tokens: np.ndarray, labels: np.ndarray, rope: tuple[np.ndarray, float]
) -> float:
    """Returns the mean loss of transformers over the labels that are not -100."""
    import torch

    patch(theirs.model, torch.tensor(rope[0]), rope[1])
    with torch.no_grad():
        loss = theirs.model(torch.tensor(tokens)[None], labels=torch.tensor(labels)[None].long()).loss
    return float(loss)


def test_answers_match_transformers(model: Path, objective: RopeObjective) -> None:
    """Three ropes of two samples make batches of two, the last of them with rows of two samples."""
    ours = Phi3ForCausalLM.from_pretrained(model, dtype="float32")
    base = ours.config.rope_base
    ropes = [
        ScoredRope.from_factors(base, FACTORS, 1.2),
        ScoredRope.from_factors(base, (1.0,) * 6),
        ScoredRope.from_factors(base, FACTORS[::-1]),
    ]
    read: list[int] = []
    results = measure(Scorer(ours, chunk=256), objective, ropes, 2, read.append)
    assert sum(read) == len(ropes) * objective.tokens_to_read
    theirs = Checkpoint(model)
    for rope, losses in zip(ropes, results, strict=True):
        means = []
        for length, samples in objective.samples.items():
            expected = [
                losses_of_theirs(theirs, each.tokens, np.where(each.scored, each.tokens, -100), rope[:2])
                for each in samples
            ]
            assert losses[length].tokens == sum(int(each.scored.sum()) for each in samples)
            counts = [each.scored.sum() for each in samples]
            means.append(np.average(expected, weights=counts))
            assert distance(losses[length].loss / losses[length].tokens, means[-1]) < 1e-5
        assert distance(objective.value(losses), np.exp((means[0] + 3 * means[1]) / 4)) < 1e-5


def test_needles_are_in_the_text_and_asked_for_at_its_end(
    tokenizer: Phi3Tokenizer, objective: RopeObjective, text: str
) -> None:
    orders = set()
    for length, samples in objective.samples.items():
        assert len(samples) == 2
        for sample in samples:
            assert len(sample.tokens) == len(sample.scored) == length
            whole = tokenizer.decode(sample.tokens.tolist())
            hay, *questions = whole.split("\nWhat is the number of the ")
            facts = [part.partition(" is ") for part in hay.split("\nThe number of the ")[1:]]
            values = {key: rest.partition(".")[0] for key, _, rest in facts}
            asked = [each.partition("?")[0] for each in questions]
            assert set(asked) == set(values)
            orders.add(asked == list(values))
            answers = tokenizer.decode(sample.tokens[sample.scored].tolist())
            assert answers == "".join(values[key] for key in asked)
            # Each half of the text has a needle, at the end of a sentence.
            share = len(tokenizer.encode(hay.split("\nThe number")[0])) / len(tokenizer.encode(hay))
            assert share < 0.5
            assert all(part.endswith(".") for part in hay.split("\nThe number of the ")[:-1])
    assert False in orders
    assert text.startswith(tokenizer.decode(objective.samples[384][0].tokens.tolist()[:9]))


def test_needles_depend_on_seed_and_number(tokenizer: Phi3Tokenizer) -> None:
    text = np.array(tokenizer.encode("What is the capital of x. " * 100))
    make = NeedleTexts(tokenizer, 2, seed=1)
    first = make(text, 400, 0).tokens.tolist()
    assert first == NeedleTexts(tokenizer, 2, seed=1)(text, 400, 0).tokens.tolist()
    assert first != make(text, 400, 1).tokens.tolist()
    assert first != NeedleTexts(tokenizer, 2, seed=2)(text, 400, 0).tokens.tolist()


def test_perplexity_scores_all_tokens_of_windows_but_the_first() -> None:
    objective = perplexity_objective(np.arange(100), (10, 20), windows=3, skip=7)
    assert [sample.tokens[0] for sample in objective.samples[10]] == [7, 7 + 2 * 31, 7 + 31]
    assert [sample.tokens[-1] for sample in objective.samples[20]] == [26, 26 + 2 * 31, 26 + 31]
    for samples in objective.samples.values():
        assert all(not each.scored[0] and each.scored[1:].all() for each in samples)
    assert objective.tokens_to_read == 3 * 9 + 3 * 19
    assert objective.longest == 20


def test_each_start_of_the_windows_is_spread() -> None:
    starts = spread(800, 100, 8)
    assert sorted(starts) == list(range(0, 800, 100))
    for count in (1, 2, 4, 8):
        gaps = np.diff(sorted(starts[:count]))
        assert len(set(gaps.tolist())) <= 1
    assert spread(100, 10, 5) == [0, 80, 40, 20, 60]


def test_between_keeps_some_samples_of_each_length() -> None:
    objective = perplexity_objective(np.arange(100), (2, 3), windows=30)
    part = objective.between(3, 7)
    assert {length: len(samples) for length, samples in part.samples.items()} == {2: 4, 3: 4}
    assert part.samples[3] == objective.samples[3][3:7]
    assert part.weights == objective.weights
    with pytest.raises(ValueError, match="there are no texts 29 to 31 of each length"):
        objective.between(29, 31)


def test_value_weighs_the_mean_loss_of_each_length() -> None:
    one = perplexity_objective(np.arange(100), (10,), (7.0,))
    assert one.value({10: TextLoss(18.0, 9)}) == pytest.approx(math.exp(2))
    two = perplexity_objective(np.arange(100), (10, 20), (1.0, 3.0))
    losses = {10: TextLoss(18.0, 9), 20: TextLoss(19.0, 19)}
    assert two.value(losses) == pytest.approx(math.exp((2 + 3) / 4))
    assert one.value({10: TextLoss(1e9, 9)}) == math.inf
    assert math.isnan(one.value({10: TextLoss(math.nan, 9)}))


@pytest.mark.parametrize("kind", ["needle", "perplexity"])
def test_held_out_text_is_apart(tokenizer: Phi3Tokenizer, text: str, kind: Any) -> None:
    options = ObjectiveOptions(kind, (300,), samples=2, needles=1, held_out=1, skip_tokens=5)
    objective, held_out = options.make(tokenizer, text, "the text")
    assert held_out is not None
    ids = tokenizer.encode(text)
    assert objective.samples[300][0].tokens[:9].tolist() == ids[5:14]
    assert held_out.samples[300][0].tokens[:9].tolist() == ids[-300:][:9]
    assert [len(each.samples[300]) for each in (objective, held_out)] == [2, 1]
    with pytest.raises(UserError, match="2 samples and 1 held out, of 300 each, need"):
        ObjectiveOptions(kind, (300,), samples=2, needles=1, skip_tokens=len(ids) - 700, held_out=1).make(
            tokenizer, text, "t.txt"
        )


def test_rejects_what_cannot_be_scored(tokenizer: Phi3Tokenizer) -> None:
    tokens = np.arange(100)
    with pytest.raises(
        UserError, match=r"t\.txt has 90 tokens after the 10 that are skipped; 2 windows of 50"
    ):
        perplexity_objective(tokens, (50,), windows=2, skip=10, source="t.txt")
    with pytest.raises(UserError, match=r"lengths \[8, 8\] must differ"):
        perplexity_objective(tokens, (8, 8))
    with pytest.raises(UserError, match="1 weights for 2 lengths"):
        perplexity_objective(tokens, (8, 9), (1.0,))
    with pytest.raises(UserError, match=r"the weight 0\.0 of length 9 must be a positive number"):
        perplexity_objective(tokens, (8, 9), (1.0, 0.0))
    with pytest.raises(UserError, match=r"100 tokens are too few for 2 needles, whose facts and questions"):
        needle_objective(tokenizer, tokens, (100,), needles=2)
    with pytest.raises(UserError, match="needles=321 must be from 1 to 320"):
        needle_objective(tokenizer, tokens, (100,), needles=321)
    with pytest.raises(UserError, match=r"objective 'x' must be needle or perplexity"):
        ObjectiveOptions("x", (8,))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="samples=0 must be at least 1"):
        ObjectiveOptions("needle", (8,), samples=0)
    with pytest.raises(ValueError, match="the first must not be"):
        Sample(tokens, tokens >= 0)


def test_memory_is_that_of_the_longest_samples() -> None:
    objective = perplexity_objective(np.arange(100), (10, 20))

    class Fits:
        compiled = SimpleNamespace(on_cpu=True)
        most = 3

        def fits(self, length: int, rows: int) -> bool:
            assert length == 20
            return rows <= self.most

    scorer: Any = Fits()
    assert objective.rows(scorer) == 3
    scorer.most = 99
    assert objective.rows(scorer) == 4
    scorer.compiled.on_cpu = False
    assert objective.rows(scorer) == 16
    scorer.most = 0
    assert objective.rows(scorer) == 1
