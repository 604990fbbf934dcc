"""Tests logits processors against those of transformers, row by row and as a whole chain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from twins import softmax

from phi3_jax.generation import processors, warpers
from phi3_jax.generation.chain import logits_processors
from phi3_jax.generation.processors import LogitsProcessor, LogitsProcessorList
from phi3_jax.generation.sequences import Sequences

VOCAB, SLOTS, PAD, JUNK = 96, 24, 3, 7
ENDS = [2, 5]
FORBIDDEN = np.array([4, 11, 50], np.int32)

compiled = jax.jit(LogitsProcessorList.__call__)


def apply(processor: LogitsProcessor, sequences: Sequences, scores: Any) -> Any:
    return compiled(LogitsProcessorList([processor]), sequences, scores)


def make_sequences(rows: list[tuple[int, int, int]], seed: int = 0) -> Sequences:
    """Returns rows of (padding, prompt tokens, new tokens) with few different tokens, so that they repeat."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(rows), SLOTS), JUNK, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, (padding, prompt, new) in enumerate(rows):
        ids[row, :padding] = PAD
        used = slice(padding, padding + prompt + new)
        ids[row, used] = rng.integers(8, 12, prompt + new)
        mask[row, used] = True
    length, new = np.array([sum(row) for row in rows]), np.array([row[2] for row in rows])
    return Sequences(*map(jnp.asarray, (ids, mask, length.astype(np.int32), new.astype(np.int32))))


def make_scores(rows: int, kind: str = "normal", vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = (3 * rng.normal(size=(rows, vocab))).astype(np.float32)
    if kind == "masked":
        scores[rng.random(scores.shape) < 0.4] = -np.inf
    if kind == "peaked":
        scores[np.arange(rows), rng.integers(0, vocab, rows)] = 80.0
    if kind == "tied":
        scores = np.round(scores)
    return scores


@dataclass(frozen=True)
class Call:
    """A processor of the reference, and its arguments: ids and scores."""

    name: str
    settings: tuple[Any, ...]
    ids: np.ndarray
    scores: np.ndarray

    @property
    def answer_key(self) -> tuple[Any, ...]:
        return self.name, self.settings, self.ids, self.scores


def theirs(*calls: Call) -> list[np.ndarray]:
    """Returns the reference's scores for each call."""
    return unpack([call.scores for call in calls], _process(calls))


@stored(whole=True)
def _process(calls: Sequence[Call]) -> dict[str, np.ndarray]:
    import torch
    from transformers.generation import logits_process

    processed = []
    for call in calls:
        processor = getattr(logits_process, call.name)(*call.settings)
        processed.append(
            processor(torch.tensor(call.ids, dtype=torch.long), torch.tensor(call.scores)).numpy()
        )
    return pack([call.scores for call in calls], processed)


def pack(scores: Sequence[np.ndarray], processed: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns which scores became -inf, as bits over all arrays, and which others changed to what."""
    before, after = (np.concatenate([each.ravel() for each in arrays]) for arrays in (scores, processed))
    changed = np.flatnonzero(~np.isneginf(after) & (after != before))
    return {"forbidden": np.packbits(np.isneginf(after)), "changed": changed, "values": after[changed]}


def unpack(scores: Sequence[np.ndarray], packed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the processed scores that `pack` packed."""
    after = np.concatenate([each.ravel() for each in scores])
    after[np.unpackbits(packed["forbidden"], count=after.size).astype(bool)] = -np.inf
    after[packed["changed"]] = packed["values"]
    parts = np.split(after, np.cumsum([each.size for each in scores])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, scores, strict=True)]


def own_ids(sequences: Sequences, row: int) -> np.ndarray:
    """Returns a row's tokens without padding and unused slots."""
    return np.asarray(sequences.ids)[row : row + 1, np.asarray(sequences.mask)[row]]


def check(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


UNEQUAL = [(0, 5, 9), (4, 3, 0), (9, 1, 2), (0, 1, 0), (2, 6, 4), (1, 2, 19), (3, 4, 1), (0, 12, 3)]
"""Rows with and without padding, with no and many new tokens, that fill all slots or few of them."""

BIASES = {(9,): 2.5, (10, 11): -3.0, (8, 9, 12): 4.0, (11, 12): -math.inf, (9, 10, 11, 8): 1.0, (8, 11): 7.0}


def bias_table(biases: dict[tuple[int, ...], float]) -> Any:
    return logits_processors(
        SimpleNamespace(sequence_bias=biases),
        prompt_length=4,
        max_new_tokens=9,
        vocab_size=VOCAB,
        eos_token_ids=ENDS,
    )[0]


# Name: our processor, and the reference's with its settings for a row of `prompt` prompt tokens.
ON_ROWS: dict[str, tuple[LogitsProcessor, str, Any]] = {
    "bias": (bias_table(BIASES), "SequenceBiasLogitsProcessor", lambda prompt: (dict(BIASES),)),
    "single_bias": (
        bias_table({(9,): 2.5, (11,): -math.inf}),
        "SequenceBiasLogitsProcessor",
        lambda prompt: ({(9,): 2.5, (11,): -math.inf},),
    ),
    "repetition": (
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        "RepetitionPenaltyLogitsProcessor",
        lambda prompt: (1.3,),
    ),
    "repetition_wanted": (
        processors.RepetitionPenaltyLogitsProcessor(0.7),
        "RepetitionPenaltyLogitsProcessor",
        lambda prompt: (0.7,),
    ),
    **{
        f"ngram_{size}": (
            processors.NoRepeatNGramLogitsProcessor(size),
            "NoRepeatNGramLogitsProcessor",
            lambda prompt, size=size: (size,),
        )
        for size in (1, 2, 3, SLOTS, SLOTS + 1)
    },
    "min_new_tokens": (
        processors.MinNewTokensLengthLogitsProcessor(3, np.array(ENDS)),
        "MinNewTokensLengthLogitsProcessor",
        lambda prompt: (prompt, 3, ENDS),
    ),
    "forced_eos": (
        processors.ForcedEOSTokenLogitsProcessor(5, np.array(ENDS)),
        "ForcedEOSTokenLogitsProcessor",
        lambda prompt: (prompt + 5, ENDS),
    ),
    "remove_invalid": (
        processors.InfNanRemoveLogitsProcessor(),
        "InfNanRemoveLogitsProcessor",
        lambda prompt: (),
    ),
    **{
        f"decay_{factor}": (
            processors.ExponentialDecayLengthPenalty(2, math.log(factor), np.array(ENDS)),
            "ExponentialDecayLengthPenalty",
            lambda prompt, factor=factor: ((2, factor), ENDS, prompt),
        )
        for factor in (1.001, 1.7, 0.5)
    },
    "suppress": (
        processors.SuppressTokensLogitsProcessor(FORBIDDEN),
        "SuppressTokensLogitsProcessor",
        lambda prompt: (FORBIDDEN,),
    ),
    "begin_suppress": (
        processors.SuppressTokensAtBeginLogitsProcessor(FORBIDDEN, 1),
        "SuppressTokensAtBeginLogitsProcessor",
        lambda prompt: (FORBIDDEN, prompt + 1),
    ),
    "normalization": (processors.LogitNormalization(), "LogitNormalization", lambda prompt: ()),
}


@pytest.mark.parametrize("kind", ["normal", "masked", "peaked"])
@pytest.mark.parametrize("name", ON_ROWS)
def test_each_row_matches_transformers_alone(name, kind):
    ours, reference, settings = ON_ROWS[name]
    sequences, scores = make_sequences(UNEQUAL), make_scores(len(UNEQUAL), kind)
    calls = [
        Call(reference, settings(prompt), own_ids(sequences, row), scores[row : row + 1])
        for row, (_, prompt, _) in enumerate(UNEQUAL)
    ]
    check(apply(ours, sequences, scores), np.concatenate(theirs(*calls)))


def test_the_processors_on_rows_change_something():
    sequences, scores = make_sequences(UNEQUAL), make_scores(len(UNEQUAL))
    idle = {"ngram_24", "ngram_25", "remove_invalid"}
    for name, (processor, *_) in ON_ROWS.items():
        assert np.array_equal(apply(processor, sequences, scores), scores) == (name in idle), name


def test_invalid_scores_become_numbers():
    scores = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    (expected,) = theirs(Call("InfNanRemoveLogitsProcessor", (), NO_IDS, scores))
    check(apply(processors.InfNanRemoveLogitsProcessor(), make_sequences([(0, 1, 0)]), scores), expected)


@stored(whole=True)
def penalized(ids: np.ndarray, padding: list[int], scores: np.ndarray) -> np.ndarray:
    """Returns the reference's scores under a penalty of 1.5 that ignores each row's padding."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor(padding))
    return processor(torch.tensor(ids, dtype=torch.long), torch.tensor(scores))


@pytest.mark.parametrize("kind", ["normal", "masked"])
def test_repetition_penalty_ignores_padding_as_transformers_does(kind):
    rows = [(4, 5, 3), (0, 9, 3), (8, 1, 3)]
    sequences, scores = make_sequences(rows), make_scores(3, kind)
    ours = apply(processors.RepetitionPenaltyLogitsProcessor(1.5), sequences, scores)
    check(ours, penalized(np.asarray(sequences.ids)[:, :12], [4, 0, 8], scores))
    np.testing.assert_array_equal(ours[:, [PAD, JUNK]], scores[:, [PAD, JUNK]])


def test_padding_and_unused_slots_never_match():
    ids = jnp.array([[PAD, PAD, PAD, 9, JUNK, JUNK], [8, PAD, 10, PAD, 12, PAD]], jnp.int32)
    mask = jnp.array([[0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    sequences = Sequences(ids, mask, jnp.array([4, 5]), jnp.array([1, 2]))
    bias = bias_table({(PAD, 9, 40): 1.0, (JUNK, 41): 1.0, (9, 42): 1.0, (PAD, 12, 43): 1.0, (PAD, 44): 1.0})
    result = np.asarray(apply(bias, sequences, np.zeros((2, VOCAB), np.float32)))
    assert [list(np.flatnonzero(row)) for row in result] == [[42], [43]]
    result = np.asarray(
        apply(processors.NoRepeatNGramLogitsProcessor(1), sequences, np.zeros((2, VOCAB), np.float32))
    )
    assert [list(np.flatnonzero(row)) for row in result] == [[9], [PAD, 8, 10, 12]]


def test_frequency_and_presence_count_generated_tokens():
    sequences, scores = make_sequences(UNEQUAL), make_scores(len(UNEQUAL), "masked")
    counts = np.zeros(scores.shape, np.float32)
    for row, (padding, prompt, new) in enumerate(UNEQUAL):
        start = padding + prompt
        np.add.at(counts[row], np.asarray(sequences.ids)[row, start : start + new], 1)
    assert counts.max() > 2
    frequency, presence = (
        processors.FrequencyPenaltyLogitsProcessor(0.3),
        processors.PresencePenaltyLogitsProcessor(-0.8),
    )
    check(apply(frequency, sequences, scores), scores - np.float32(0.3) * counts)
    check(apply(presence, sequences, scores), scores + np.float32(0.8) * (counts > 0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Scale(LogitsProcessor):
    """A user's processor with one setting, as some of ours have."""

    by: Any

    def __call__(self, sequences: Sequences, scores: Any) -> Any:
        return scores * self.by


def test_lists_of_different_classes_differ_in_structure():
    """Otherwise a cache of `jit` may mix up programs: jaxlib does not compare the class of a dataclass."""
    repetition = processors.RepetitionPenaltyLogitsProcessor(0.3)
    frequency = processors.FrequencyPenaltyLogitsProcessor(0.3)
    own = Scale(0.3)
    lists = [[], [repetition], [frequency], [own], [own, frequency], [frequency, own]]
    structures = [jax.tree.structure(LogitsProcessorList(each)) for each in lists]
    for index, structure in enumerate(structures):
        assert structures.index(structure) == index
    assert structures[1] == jax.tree.structure(
        LogitsProcessorList([processors.RepetitionPenaltyLogitsProcessor(2.0)])
    )


def test_a_list_is_a_pytree_of_its_processors():
    chain = LogitsProcessorList([processors.RepetitionPenaltyLogitsProcessor(1.5), Scale(2.0)])
    doubled = jax.tree.map(lambda x: 2 * x, chain)
    assert isinstance(doubled, LogitsProcessorList)
    assert [type(each) for each in doubled] == [processors.RepetitionPenaltyLogitsProcessor, Scale]
    assert jax.tree.leaves(doubled) == [3.0, 4.0]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(chain)]
    assert paths == ["[0].penalty", "[1].by"]


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_forced_bos_is_the_second_token(prompt):
    for new in range(4):
        scores = make_scores(1)
        chain = build(SimpleNamespace(forced_bos_token_id=6), prompt)
        sequences = make_sequences([(0, prompt, new)])
        ids = np.asarray(sequences.ids)[:, : prompt + new]
        check(
            compiled(chain, sequences, scores),
            *theirs(Call("ForcedBOSTokenLogitsProcessor", (6,), ids, scores)),
        )


@stored(whole=True)
def constrained(table: np.ndarray, last: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the reference's scores if `table` marks the tokens that may follow each token."""
    import torch
    from transformers import PrefixConstrainedLogitsProcessor

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return np.flatnonzero(table[int(ids[-1])]).tolist()

    out = PrefixConstrainedLogitsProcessor(allowed, 1)(torch.tensor(last), torch.tensor(scores))
    return pack([scores], [out.numpy()])


def test_allowed_tokens_match_transformers_prefix_constraint():
    table = np.random.default_rng(1).random((VOCAB, VOCAB)) < 0.1
    sequences, scores = make_sequences(UNEQUAL), make_scores(len(UNEQUAL), "masked")
    last = np.asarray(sequences.last(1)[0])[:, 0]
    scores[4, table[last[4]]] = -np.inf

    ours = processors.AllowedTokensLogitsProcessor(lambda s: jnp.asarray(table)[s.last(1)[0][:, 0]])
    result = apply(ours, sequences, scores)
    check(result, *unpack([scores], constrained(table, last[:, None], scores)))
    assert set(np.asarray(result)[4]) == {0.0, -np.inf}


NO_IDS = np.zeros((1, 0), np.int64)

# Name: our warper that keeps at least `keep` tokens, and the reference's with its settings.
WARPERS: dict[str, tuple[Any, str, Any]] = {
    "temperature": (
        lambda keep: warpers.TemperatureLogitsWarper(0.7),
        "TemperatureLogitsWarper",
        lambda keep: (0.7,),
    ),
    "top_h": (lambda keep: warpers.TopHLogitsWarper(0.4), "TopHLogitsWarper", lambda keep: (0.4,)),
    **{
        f"top_k_{k}": (
            lambda keep, k=k: warpers.TopKLogitsWarper(k, keep),
            "TopKLogitsWarper",
            lambda keep, k=k: (k, -math.inf, keep),
        )
        for k in (1, 2, 17, VOCAB, 1000)
    },
    **{
        f"{name}_{value}": (
            lambda keep, make=make, value=value: make(value, keep),
            make.__name__,
            lambda keep, value=value: (value, -math.inf, keep),
        )
        for name, make, values in [
            ("top_p", warpers.TopPLogitsWarper, (0.01, 0.5, 0.9, 0.999)),
            ("min_p", warpers.MinPLogitsWarper, (0.001, 0.1, 1.0)),
            ("typical", warpers.TypicalLogitsWarper, (0.05, 0.4, 0.95)),
            ("epsilon", warpers.EpsilonLogitsWarper, (0.0003, 0.05, 0.9)),
            ("eta", warpers.EtaLogitsWarper, (0.0003, 0.05, 0.9)),
        ]
        for value in values
    },
}


def both_scores(name: str, keep: int, scores: np.ndarray) -> tuple[Any, np.ndarray]:
    """Returns our scores of a warper, and the reference's."""
    make, reference, settings = WARPERS[name]
    ours = apply(make(keep), make_sequences(UNEQUAL[: len(scores)]), scores)
    (expected,) = theirs(Call(reference, settings(keep), NO_IDS, scores))
    return ours, expected


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("kind", ["normal", "masked", "peaked"])
@pytest.mark.parametrize("name", WARPERS)
def test_warpers_match_transformers(name, kind, keep):
    if kind == "peaked" and keep > 1 and name.startswith("typical"):
        pytest.skip("in the reference its sort decides which of equally distant tokens stay")
    check(*both_scores(name, keep, make_scores(len(UNEQUAL), kind)))


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("name", ["temperature", "top_k_17", "min_p_0.1", "typical_0.4", "epsilon_0.05"])
def test_warpers_on_ties(name, keep):
    if keep > 1 and name.startswith(("typical", "min_p")):
        pytest.skip("in the reference its sort decides which of equal tokens stay")
    check(*both_scores(name, keep, make_scores(len(UNEQUAL), "tied")))


def test_top_p_keeps_ties_together():
    scores = make_scores(8, "tied")
    ours = np.asarray(apply(warpers.TopPLogitsWarper(0.6), make_sequences(UNEQUAL), scores))
    (expected,) = theirs(Call("TopPLogitsWarper", (0.6,), NO_IDS, scores))
    assert np.all(np.isfinite(ours) >= np.isfinite(expected))
    least = np.where(np.isfinite(expected), expected, np.inf).min(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.isfinite(ours), scores >= least)


def test_zeros_of_both_signs_are_equal():
    scores = np.array([[0.0, -0.0, -1.0, 0.0, -0.0]], np.float32)
    result = apply(warpers.TopKLogitsWarper(1), make_sequences([(0, 1, 0)]), scores)
    np.testing.assert_array_equal(np.isfinite(result), [[True, True, False, True, True]])


@pytest.mark.parametrize(
    "name", ["top_k_17", "top_p_0.5", "top_p_0.9", "top_p_0.999", "typical_0.4", "typical_0.95"]
)
def test_a_large_vocabulary(name):
    """Only rounding of sums may change which tokens stay."""
    scores = make_scores(3, vocab=32064)
    stays, expected = map(np.isfinite, both_scores(name, 1, scores))
    assert np.all(np.sum(softmax(scores) * (stays != expected), axis=1) < 2e-6)
    if name.startswith("top_k"):
        np.testing.assert_array_equal(stays, expected)


def build(config: Any, prompt_length: int, **changes: Any) -> LogitsProcessorList:
    settings = {"max_new_tokens": 6, "vocab_size": VOCAB, "eos_token_ids": ENDS} | changes
    return LogitsProcessorList(logits_processors(config, prompt_length=prompt_length, **settings))


@lru_cache
def their_model() -> Any:
    """Returns a model of the reference with any weights."""
    import transformers

    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        eos_token_id=ENDS,
    )
    return transformers.Phi3ForCausalLM(config)


@stored(whole=True)
def their_chain(
    settings: dict[str, Any], mask: np.ndarray, steps: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns the names of the reference's processors for these settings, and its scores of each step."""
    import torch
    import transformers

    model, prompt = their_model(), mask.shape[1]
    config = transformers.GenerationConfig(**settings)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    config = model._prepare_generated_length(
        config, True, config.min_length is None, "input_ids", prompt, None
    )
    chain = model._get_logits_processor(config, prompt, model_kwargs={"attention_mask": torch.tensor(mask)})
    processed = [
        chain(torch.tensor(ids, dtype=torch.long), torch.tensor(scores)).numpy() for ids, scores in steps
    ]
    return expected_names(chain, config, prompt), pack([scores for _, scores in steps], processed)


def random_settings(rng: np.random.Generator, prompt_length: int) -> dict[str, Any]:
    """Returns random settings, each on or off; lists name tokens that occur.

    There are no ties, among which the reference's sort would choose: only one end token is forced, and beams,
    which keep several tokens, come without `remove_invalid_values`. Neither does the length penalty, which
    would raise the finite scores to infinity.
    """

    def maybe(value: Any) -> Any:
        return value if rng.random() < 0.4 else None

    def token() -> int:
        return int(rng.integers(8, 13))

    def words() -> list[list[int]]:
        return [[token() for _ in range(rng.integers(1, 4))] for _ in range(12)]

    beams = int(rng.integers(1, 3))
    decay = maybe((int(rng.integers(0, 4)), float(rng.uniform(0.8, 1.5))))
    settings = {
        "sequence_bias": maybe({tuple(word): float(rng.normal()) for word in words()}),
        "repetition_penalty": maybe(float(rng.uniform(0.7, 1.6))),
        "no_repeat_ngram_size": maybe(int(rng.integers(2, 4))),
        "bad_words_ids": maybe([*words(), [ENDS[0]]]),
        "min_length": maybe(prompt_length + int(rng.integers(0, 5))),
        "min_new_tokens": maybe(int(rng.integers(0, 5))),
        "forced_bos_token_id": maybe(6),
        "forced_eos_token_id": maybe([ENDS[:1], ENDS[1]][rng.integers(2)]),
        "remove_invalid_values": bool(beams == 1 and decay is None and rng.random() < 0.5),
        "exponential_decay_length_penalty": decay,
        "suppress_tokens": maybe([token(), token()]),
        "begin_suppress_tokens": maybe([token(), token()]),
        "do_sample": bool(rng.random() < 0.8),
        "num_beams": beams,
        "temperature": maybe(float(rng.uniform(0.3, 2.0))),
        "top_h": maybe(float(rng.uniform(0.5, 0.95))),
        "top_k": maybe(int(rng.integers(1, 90))),
        "top_p": maybe(float(rng.uniform(0.5, 1.0))),
        "min_p": maybe(float(rng.uniform(0.0, 0.1))),
        "typical_p": maybe(float(rng.uniform(0.3, 1.0))),
        "epsilon_cutoff": maybe(float(rng.uniform(0.0, 0.02))),
        "eta_cutoff": maybe(float(rng.uniform(0.0, 0.02))),
        "renormalize_logits": bool(rng.random() < 0.3),
    }
    ends = [ENDS, ENDS[:1]][rng.integers(2)]
    limits = {"eos_token_id": ends, "pad_token_id": PAD, "max_new_tokens": 6}
    return limits | {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize("seed", range(20))
def test_the_chain_matches_transformers(seed):
    rng = np.random.default_rng(seed)
    prompt = int(rng.choice([1, 2, 7]))
    settings = random_settings(rng, prompt)
    chain = build(SimpleNamespace(**settings), prompt, eos_token_ids=settings["eos_token_id"])
    padding = rng.integers(0, prompt, 5)
    padding[0] = 0
    mask = (np.arange(prompt) >= padding[:, None]).astype(np.int64)
    steps, ours = [], []
    for new in range(6):
        sequences = make_sequences([(int(p), prompt - int(p), new) for p in padding], seed)
        scores = make_scores(5, ["normal", "masked"][new % 2], seed=seed + new)
        steps.append((np.asarray(sequences.ids)[:, : prompt + new], scores))
        ours.append(compiled(chain, sequences, scores))
    names, packed = their_chain(settings, mask, steps)
    assert [type(p).__name__ for p in chain] == names
    for own, other in zip(ours, unpack([scores for _, scores in steps], packed), strict=True):
        check(own, other)


def expected_names(chain: Any, config: Any, prompt: int) -> list[str]:
    """Returns the names of the reference's processors, without those that do nothing after this prompt."""
    names = [type(processor).__name__.replace("MinLength", "MinNewTokensLength") for processor in chain]
    idle = set()
    if prompt > 1:
        idle.add("ForcedBOSTokenLogitsProcessor")
    if (config.min_length or 0) <= prompt:
        idle.add("MinNewTokensLengthLogitsProcessor")
    return [name for name in dict.fromkeys(names) if name not in idle]


AFTER_FORCED_BOS = (
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    *(
        f"{name}LogitsWarper"
        for name in ("Temperature", "TopH", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta")
    ),
    "LogitNormalization",
)


FULL = {
    "sequence_bias": [[[9, 10], 1.0]],
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[8, 9]],
    "min_new_tokens": 2,
    "forced_bos_token_id": 6,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.1),
    "suppress_tokens": [8],
    "begin_suppress_tokens": [9],
    "do_sample": True,
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "renormalize_logits": True,
}
"""A value for every setting."""


def test_order_with_every_setting():
    own = object()
    chain = build(SimpleNamespace(**FULL), 1, user=[own])
    names = [type(processor).__name__ for processor in chain]
    assert names[:5] == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "FrequencyPenaltyLogitsProcessor",
        "PresencePenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
    ]
    assert names[5:8] == [
        "NoBadWordsLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
    ]
    assert tuple(names[8:]) == (*AFTER_FORCED_BOS[:5], "object", *AFTER_FORCED_BOS[5:])
    assert chain[names.index("object")] is own


def test_other_numbers_do_not_compile_again():
    other = FULL | {
        "sequence_bias": [[[11, 12], -2.0]],
        "repetition_penalty": 1.3,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.5,
        "bad_words_ids": [[18, 19]],
        "min_new_tokens": 4,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 5,
        "exponential_decay_length_penalty": (1, 1.3),
        "suppress_tokens": [10],
        "begin_suppress_tokens": [11],
        "temperature": 2,
        "top_h": 1,
        "top_k": 7,
        "top_p": 0.4,
        "min_p": 0.5,
        "typical_p": 0.3,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
    }
    run = jax.jit(lambda chain, *arguments: chain(*arguments))
    for settings in (FULL, other):
        chain = build(SimpleNamespace(**settings), 1)
        run(chain, make_sequences(UNEQUAL), make_scores(len(UNEQUAL)))
    assert run._cache_size() == 1


def test_settings_that_are_off_make_no_processor():
    assert build(SimpleNamespace(), 3) == ()
    off = {
        **dict.fromkeys(FULL),
        "repetition_penalty": 1.0,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "min_length": 3,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "renormalize_logits": False,
    }
    assert build(SimpleNamespace(**off), 3) == ()


def test_greedy_search_ignores_settings_of_the_distribution():
    assert build(SimpleNamespace(do_sample=False, temperature=0.0, top_p=0.5), 3) == ()


@pytest.mark.parametrize(
    ("min_length", "min_new_tokens", "expected"), [(9, None, 5), (9, 2, 2), (4, None, None)]
)
def test_min_new_tokens_overrides_min_length(min_length, min_new_tokens, expected):
    chain = build(SimpleNamespace(min_length=min_length, min_new_tokens=min_new_tokens), 4)
    assert [processor.min_new_tokens for processor in chain] == ([] if expected is None else [expected])


def test_ignores_end_tokens_outside_the_vocabulary():
    chain = build(SimpleNamespace(min_new_tokens=3), 4, eos_token_ids=[-1, 2, VOCAB])
    result = compiled(chain, make_sequences([(0, 4, 0)]), np.zeros((1, VOCAB), np.float32))
    assert list(np.flatnonzero(np.asarray(result)[0])) == [2]
    assert build(SimpleNamespace(min_new_tokens=3), 4, eos_token_ids=[-1]) == ()


@pytest.mark.parametrize(("beams", "ends", "keep"), [(1, ENDS, 1), (4, ENDS, 3), (4, [2], 2), (4, [], 2)])
def test_beams_keep_a_token_that_does_not_end(beams, ends, keep):
    (warper,) = build(SimpleNamespace(do_sample=True, top_k=1, num_beams=beams), 4, eos_token_ids=ends)
    assert warper.min_tokens_to_keep == keep


def test_a_user_processor_replaces_its_class():
    own = processors.RepetitionPenaltyLogitsProcessor(2.0)
    config = SimpleNamespace(repetition_penalty=1.2, no_repeat_ngram_size=2)
    chain = build(config, 4, user=[own, print])
    assert chain[0] is own
    assert chain[2] is print
    assert len(chain) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, r"temperature=0 .* \(0, inf\).* do_sample=False"),
        ({"temperature": -0.5}, r"temperature=-0.5 .* do_sample=False"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1 .* 0 keeps every token"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"top_k": True}, "top_k=True must be an integer"),
        ({"top_p": -0.1}, r"top_p=-0.1 .* \[0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 .* \[0, 1\]"),
        ({"top_h": 0.0}, r"top_h=0.0 .* \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p=-0.1 .* \[0, 1\]"),
        ({"min_p": 1.1}, r"min_p=1.1 .* \[0, 1\]"),
        ({"typical_p": 0}, r"typical_p=0 .* \(0, 1\]"),
        ({"epsilon_cutoff": 1.0}, r"epsilon_cutoff=1.0 .* \[0, 1\)"),
        ({"eta_cutoff": -1e-3}, r"eta_cutoff=-0.001 .* \[0, 1\)"),
        ({"num_beams": 0}, "num_beams=0 must be an integer of at least 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 .* \(0, inf\)"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        ({"presence_penalty": math.nan}, "presence_penalty=nan"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2 .* at least 0"),
        ({"bad_words_ids": []}, r"bad_words_ids=\[\]"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids=\[\[\]\]"),
        ({"bad_words_ids": [8, 9]}, r"bad_words_ids=\[8, 9\] must be a list of lists"),
        ({"bad_words_ids": [[8, VOCAB]]}, "bad_words_ids names token 96; .* 0 to 95"),
        (
            {"bad_words_ids": [[2], [5]]},
            r"bad_words_ids=\[\[2\], \[5\]\] has only end tokens.*suppress_tokens",
        ),
        ({"sequence_bias": {}}, r"sequence_bias=\{\}"),
        ({"sequence_bias": {(): 1.0}}, r"sequence_bias=\{\(\): 1.0\}"),
        ({"sequence_bias": {8: 1.0}}, r"sequence_bias=\{8: 1.0\}"),
        ({"sequence_bias": [[[8, 9]]]}, r"sequence_bias=\[\[\[8, 9\]\]\]"),
        ({"sequence_bias": {(8,): "much"}}, "sequence_bias=.*'much'"),
        ({"sequence_bias": {(8,): math.nan}}, "sequence_bias=.*nan"),
        ({"sequence_bias": {(8, -1): 1.0}}, "sequence_bias names token -1; .* 0 to 95"),
        ({"suppress_tokens": [8, 96]}, "suppress_tokens names token 96; .* 0 to 95"),
        ({"suppress_tokens": "all"}, "suppress_tokens='all' must be a list"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens names token -1"),
        ({"forced_bos_token_id": 96}, "forced_bos_token_id names token 96"),
        ({"forced_bos_token_id": [6]}, r"forced_bos_token_id names token \[6\]"),
        ({"forced_eos_token_id": 96}, "forced_eos_token_id names token 96"),
        ({"forced_eos_token_id": []}, r"forced_eos_token_id=\[\] must name a token"),
        ({"min_length": -1}, "min_length=-1 .* at least 0"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5 must be an integer"),
        (
            {"exponential_decay_length_penalty": 1.1},
            r"exponential_decay_length_penalty=1.1 .* \(start, factor\)",
        ),
        ({"exponential_decay_length_penalty": (2, 0.0)}, r"exponential_decay_length_penalty=\(2, 0.0\)"),
        ({"exponential_decay_length_penalty": (-1, 1.1)}, r"exponential_decay_length_penalty=\(-1, 1.1\)"),
    ],
    ids=str,
)
def test_rejects_other_values(settings, message):
    with pytest.raises(ValueError, match=message):
        build(SimpleNamespace(do_sample=True, **settings), 4)


def test_a_decay_needs_an_end_token():
    with pytest.raises(ValueError, match="there are none; set eos_token_id"):
        build(SimpleNamespace(exponential_decay_length_penalty=(2, 1.1)), 4, eos_token_ids=[])
