"""Sliding perplexity compared with the method of transformers' documentation, run with transformers."""

from typing import Any

import jax
import numpy as np
import pytest
from answers import stored
from compilations import compilations
from reference import LONG, Reference, longrope, on_mesh, pair, small_config
from strict_settings import strict_settings
from their_perplexity import Rope, perplexity_of_theirs

from phi3_jax import Phi3ForCausalLM, make_mesh
from phi3_jax.config.rope_argument import RopeArgument, parse_rope
from phi3_jax.evaluation.perplexity import TextLoss, Window, perplexity, sliding_losses, windows
from phi3_jax.evaluation.scorer import Scorer, frequencies_for

TOKENS = 90
LISTS = longrope()["rope_scaling"]
ROPES = {
    "none": parse_rope("none"),
    "linear": parse_rope("linear:factor=4"),
    "dynamic": parse_rope("dynamic:factor=4,original_max_position_embeddings=16"),
    "yarn": parse_rope("yarn:factor=4"),
    "longrope": RopeArgument("longrope", small_config(**longrope()).rope_scaling),
}
"""Ropes of a model that was trained on 16 tokens."""


def text(count: int = TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 96, count)


@stored
def losses_of_theirs(
    theirs: Reference, ids: np.ndarray, kept: int, divisors: list[float], scaling: float
) -> Any:
    """Returns each token's loss; from position `kept` on, frequencies are divided by `divisors`."""
    import torch

    plain = theirs.config.rope_base.inv_freq()
    unscaled = np.arange(len(ids))[:, None] < kept
    angles = np.arange(len(ids))[:, None] * np.where(unscaled, plain, plain / np.array(divisors, np.float32))
    angles = torch.tensor(np.concatenate([angles, angles], axis=1)).float()[None]
    tables = angles.cos() * scaling, angles.sin() * scaling
    theirs.model.model.rotary_emb.forward = lambda x, position_ids: tables
    with torch.no_grad():
        logits = theirs.model(torch.tensor(ids)[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = small_config(
        max_position_embeddings=16, original_max_position_embeddings=16, num_hidden_layers=2
    )
    return pair("causal", config, tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def scorer(models: Any) -> Scorer:
    return Scorer(models[0], chunk=8)


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (24, 24), (37, 5), (90, 45), (7, 3), (64, 1)])
def test_windows_match_the_documentation(length: int, stride: int) -> None:
    ours = windows(TOKENS, length, stride)
    scored = [index for window in ours for index in range(window.scored_from, window.end)]
    firsts = [window.begin for window in ours] if stride == length else [0]
    assert scored == [index for index in range(TOKENS) if index not in firsts]
    previous, expected = 0, []
    for begin in range(0, TOKENS, stride):
        end = min(begin + length, TOKENS)
        expected.append(Window(begin, end, max(previous, begin + 1)))
        previous = end
        if end == TOKENS:
            break
    assert ours == expected


@pytest.mark.parametrize(("length", "stride"), [(40, 20), (33, 7), (90, 90), (16, 16), (8, 1), (77, 50)])
@pytest.mark.parametrize("name", ROPES)
def test_matches_transformers(models: Any, scorer: Scorer, name: str, length: int, stride: int) -> None:
    ours, theirs = models
    config = ROPES[name].apply(ours.config) if name != "longrope" else ours.config.replace(**longrope())
    total = perplexity(scorer, text(), config, length=length, stride=stride)
    expected, count = perplexity_of_theirs(theirs, text(), length, stride, Rope(config))
    assert total.tokens == count
    assert total.loss == pytest.approx(expected, rel=1e-5)
    assert total.perplexity == pytest.approx(np.exp(expected / count), rel=1e-5)
    if length > 16 and name != "none":
        plain = perplexity(scorer, text(), length=length, stride=stride)
        assert abs(plain.loss / expected - 1) > 1e-3


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_matches_transformers_where_nothing_is_promoted(models: Any, name: str) -> None:
    """With 64-bit numbers and JAX's strict promotion."""
    ours, theirs = models
    with strict_settings():
        config = ROPES[name].apply(ours.config) if name != "longrope" else ours.config.replace(**longrope())
        total = perplexity(Scorer(ours, chunk=8), text(), config, length=40, stride=20)
    expected, count = perplexity_of_theirs(theirs, text(), 40, 20, Rope(config))
    assert total.tokens == count
    assert total.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [8, 16, 512])
def test_scores_do_not_depend_on_the_chunk(models: Any, chunk: int) -> None:
    ours, _ = models
    whole = jax.jit(lambda model, ids: model(ids).logits)(ours, text()[None])
    log_p = jax.nn.log_softmax(whole[0, :-1], axis=-1)
    inv_freq, scaling = frequencies_for(ours.config, TOKENS)
    scorer = Scorer(ours, chunk=chunk)
    for scored_from in (1, 8, 9, 17, TOKENS - 1):
        scores = scorer.score(text(), inv_freq, scaling, scored_from=scored_from)
        expected = -np.asarray(log_p)[np.arange(scored_from - 1, TOKENS - 1), text()[scored_from:]]
        np.testing.assert_allclose(scores.losses[0], expected, rtol=1e-5, atol=1e-6)
        best = np.asarray(whole[0].argmax(-1))[scored_from - 1 : -1]
        np.testing.assert_array_equal(scores.greedy[0], best == text()[scored_from:])


DIVISORS = [[1.0] * 6, [4.0] * 6, LONG]
"""Divisors of the frequencies of three rows."""


def population() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies, attention factors and unscaled tokens of three rows."""
    inv_freq = small_config().rope_base.inv_freq() / np.array(DIVISORS, np.float32)
    return inv_freq, np.array([1.0, 1.1, 1.3]), np.array([0, 5, 20])


def test_rows_of_a_population_match_each_alone(models: Any) -> None:
    ours, theirs = models
    inv_freq, scaling, initial = population()
    scorer = Scorer(ours, chunk=16)
    together = scorer.score(text(), inv_freq, scaling, initial_tokens=initial, scored_from=30).total
    alone = [
        scorer.score(text(), inv_freq[i], scaling[i], initial_tokens=initial[i], scored_from=30).total[0]
        for i in range(3)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    for row in range(3):
        losses = losses_of_theirs(theirs, text(), int(initial[row]), DIVISORS[row], float(scaling[row]))
        assert together[row] == pytest.approx(float(losses[29:].sum()), rel=1e-5)


def test_rows_of_different_texts_match_each_alone(models: Any) -> None:
    ours, _ = models
    rows = np.stack([text(50, seed) for seed in range(3)])
    inv_freq, scaling = frequencies_for(ours.config, 50)
    scorer = Scorer(ours, chunk=16)
    together = scorer.score(rows, inv_freq, scaling).total
    alone = [scorer.score(row, inv_freq, scaling).total[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(together)) == 3


@pytest.mark.slow
def test_all_ropes_share_programs() -> None:
    """There are two sizes of the cache an octave, and one program for the head."""
    ours = Phi3ForCausalLM(
        small_config(num_hidden_layers=1, vocab_size=112)
    )  # no other test has its programs
    scorer = Scorer(ours, chunk=8)
    arguments = {name: rope.scaling for name, rope in ROPES.items()}
    configs = [
        ours.config.replace(rope_scaling=each, original_max_position_embeddings=16)
        for each in arguments.values()
    ]
    for config in configs:  # the formulas compute eagerly
        for length in (48, 33, 20, 40, 90):
            frequencies_for(config, length)
    slides = ((48, 24), (33, 11), (20, 20), (40, 3))
    with compilations() as first:
        for length, stride in slides:
            list(sliding_losses(scorer, text(), configs[0], length=length, stride=stride))
    assert first
    with compilations() as others:
        for config in configs[1:]:
            for length, stride in slides:
                list(sliding_losses(scorer, text(), config, length=length, stride=stride))
        list(sliding_losses(scorer, text(), configs[1], length=48, stride=24, initial_tokens=7))
    assert others == []
    with compilations() as longer:
        list(sliding_losses(scorer, text(), configs[0], length=90, stride=90))
    assert len(longer) > 0
    programs = scorer.compiled._programs
    feed = next(program for step, program in programs.items() if step.__name__ == "_feed")
    ends = [
        window.end - window.begin for slide in (*slides, (90, 90)) for window in windows(len(text()), *slide)
    ]
    sizes = {scorer.memory(each) for each in ends}
    assert len(sizes) <= 6  # of 8, 16, 24, 32, 48, 96
    assert feed._cache_size() == len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=8", "fsdp=2,tensor=2,context=2"])
def test_matches_one_device_on_a_mesh(models: Any, sizes: str) -> None:
    ours, _ = models
    inv_freq, scaling, initial = population()
    divided = Scorer(on_mesh(ours, make_mesh(sizes)), chunk=16)
    expected = Scorer(ours, chunk=16).score(text(), inv_freq, scaling, initial_tokens=initial).total
    np.testing.assert_allclose(
        divided.score(text(), inv_freq, scaling, initial_tokens=initial).total, expected, rtol=1e-5
    )


def test_progress_counts_every_token(models: Any) -> None:
    counts: list[int] = []
    for window, _ in sliding_losses(
        Scorer(models[0], chunk=8), text(), models[0].config, length=40, stride=30, progress=counts.append
    ):
        assert sum(counts) == window.end - window.begin - 1
        counts.clear()


def test_head_gets_only_scored_chunks(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never gets more than POSITIONS positions, with any number of rows."""
    shapes: list[tuple[int, ...]] = []
    logits = Phi3ForCausalLM.logits

    def watched(self: Any, hidden_states: Any) -> Any:
        shapes.append(hidden_states.shape[:2])
        return logits(self, hidden_states)

    monkeypatch.setattr(Phi3ForCausalLM, "logits", watched)
    monkeypatch.setattr("phi3_jax.evaluation.scorer.POSITIONS", 32)
    model = Phi3ForCausalLM(small_config(num_hidden_layers=1, vocab_size=128))
    scorer = Scorer(model, chunk=16)
    calls: list[str] = []
    compiled = scorer.compiled

    def counted(step: Any, *arguments: Any, **static: Any) -> Any:
        calls.append(step.__name__)
        return compiled(step, *arguments, **static)

    monkeypatch.setattr(
        scorer,
        "compiled",
        type(
            "Counted",
            (),
            {"__call__": staticmethod(counted), "__getattr__": lambda self, name: getattr(compiled, name)},
        )(),
    )
    inv_freq, _ = frequencies_for(model.config, 80)
    scorer.score(text(80), np.stack([inv_freq] * 8), scored_from=65)
    assert calls.count("_feed") == 5
    assert calls.count("_score") == 1
    assert shapes == [(8, 4)]


def test_rejects_a_length_that_does_not_fit_in_memory(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import phi3_jax.generation.memory as module

    scorer = Scorer(models[0], chunk=8)
    # 2 layers of 2 heads of 12 float32 numbers, keys and values; 40 tokens are in a cache of 48.
    assert scorer.memory(40, rows=3) == 3 * 48 * 2 * 2 * 12 * 4 * 2
    monkeypatch.setattr(module, "_free", lambda device: 45_000)
    monkeypatch.setattr(scorer, "score", None)
    with pytest.raises(ValueError, match=r"41 tokens need 0.00 GiB for keys and values, and memory has"):
        next(sliding_losses(scorer, text(), models[0].config, length=41, stride=5))
    with pytest.raises(ValueError, match=r"4 rows of 24 tokens need .* a smaller length or fewer rows"):
        scorer.check_memory(24, rows=4)
    scorer.check_memory(24)


@pytest.mark.parametrize(
    ("tokens", "length", "stride", "words"),
    [
        (1, 8, 4, "the text has 1 tokens; perplexity needs at least 2"),
        (9, 1, 1, "length=1 must be at least 2"),
        (9, 8, 9, "stride=9 must be from 1 to the length, 8"),
        (9, 8, 0, "stride=0 must be from 1"),
    ],
)
def test_rejects_wrong_windows(tokens: int, length: int, stride: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        windows(tokens, length, stride)


def test_rejects_arguments_with_different_rows(models: Any) -> None:
    scorer = Scorer(models[0])
    inv_freq, _ = frequencies_for(models[0].config, 9)
    with pytest.raises(ValueError, match="scored_from=9 must be from 1 to 8, for 9 tokens"):
        scorer.score(text(9), inv_freq, scored_from=9)
    with pytest.raises(ValueError, match="have 1, 2, 3, 1 rows; each must have one, or as many"):
        scorer.score(text(9), np.stack([inv_freq] * 2), np.ones(3))


def test_perplexity_may_be_infinite() -> None:
    assert TextLoss(1e6, 10).perplexity == float("inf")
    assert (TextLoss(1.0, 2) + TextLoss(3.0, 4)) == TextLoss(4.0, 6)
