"""Tests prompts as embeddings, answers without a prompt, transition scores, and what generate refuses."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from answers import stored
from marks import slow
from reference import Reference, distance, longrope, small_config
from twins import PAD, Twins, ask, prompts

from phi3_jax import Phi3ForCausalLM, Phi3Model
from phi3_jax.config import generation_checks as checks
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.generation import prompts as prompts_module
from phi3_jax.generation.request import GenerationRequest
from phi3_jax.model.arguments import UNSUPPORTED

BATCH = prompts((20, 13), seed=8)
EMBEDS = np.random.default_rng(8).normal(size=(2, 20, 48)).astype(np.float32)
RECORDED = {"return_dict_in_generate": True, "output_scores": True}


def assert_same_records(ours: Any, theirs: Any, *names: str) -> None:
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    for name in names:
        for own, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            for mine, each in zip(own, other, strict=True):
                np.testing.assert_allclose(mine, each, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 29, "min_length": 25, "eos_token_id": [40, 50]},
        {"max_new_tokens": 3, "forced_bos_token_id": 44, "begin_suppress_tokens": [44]},
        {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_embeddings_without_ids(shallow: Twins, options: dict[str, Any]) -> None:
    """Returns the new tokens only."""
    answer = shallow.same(None, BATCH[1], inputs_embeds=EMBEDS, **options)
    assert answer.shape[1] == options.get("max_new_tokens", 9)


@stored(whole=True)
def with_a_penalty(reference: Reference, **options: Any) -> np.ndarray:
    """Returns the reference's answer to embeddings, of which its penalty sees nothing, as it warns."""
    with pytest.warns(UserWarning, match="Passing `repetition_penalty` with `inputs_embeds`"):
        return ask(reference, None, None, **options)


def test_processors_see_new_tokens_only(shallow: Twins) -> None:
    """This penalty prefers tokens that occurred, each id of a prompt's too."""
    options = {"inputs_embeds": EMBEDS, "max_new_tokens": 12, "repetition_penalty": 0.1}
    expected = with_a_penalty(shallow.reference, **options)
    np.testing.assert_array_equal(shallow.ours(None, None, **options), expected)


@pytest.mark.parametrize("length", [20, 9])
def test_embeddings_with_ids(shallow: Twins, length: int) -> None:
    """Ids are returned and seen by processors; they belong to the last embeddings."""
    ids = np.random.default_rng(3).integers(4, 96, (2, length))
    rules = {"sequence_bias": {(int(row[-1]), 35): 50.0 for row in ids}, "no_repeat_ngram_size": 2}
    rules |= {"suppress_tokens": [PAD], "inputs_embeds": EMBEDS}
    if length == 20:
        rules["repetition_penalty"] = 1.5
    answer = shallow.same(ids, BATCH[1], max_new_tokens=12, **rules)
    assert (answer[:, length] == 35).all(), "the bias sees the last id"
    shallow.same(ids, BATCH[1], inputs_embeds=EMBEDS, max_length=40)


def test_embeddings_are_the_prompt_of_all_outputs(shallow: Twins) -> None:
    options = {"max_new_tokens": 3, "output_hidden_states": True, "output_attentions": True, **RECORDED}
    ours, theirs = (
        run(None, None, inputs_embeds=EMBEDS[:1], **options) for run in (shallow.ours, shallow.theirs)
    )
    assert_same_records(ours, theirs, "hidden_states", "attentions")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2, "seed": 3},
    ],
)
def test_embeddings_of_ids_give_the_answer_to_the_ids(
    twins_of: Callable[..., Twins], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The prompt comes in chunks, and is computed again where its row outgrows the short list."""
    monkeypatch.setattr(prompts_module, "PREFILL_CHUNK", 8)
    twins = twins_of(num_hidden_layers=1, **longrope(24))
    ids, mask = BATCH
    embeds = np.asarray(twins.model.get_input_embeddings()(ids))
    options |= {"max_new_tokens": 10, "return_dict_in_generate": True}
    expected = twins.ours(ids, mask, **options)
    new = twins.ours(None, mask, inputs_embeds=embeds, **options)
    np.testing.assert_array_equal(new.sequences, np.asarray(expected.sequences)[:, 20:])
    np.testing.assert_array_equal(new.past_key_values.tokens, expected.past_key_values.tokens)
    assert distance(new.past_key_values.keys[0], expected.past_key_values.keys[0]) < 1e-5


def test_answers_without_a_prompt(shallow: Twins) -> None:
    answer = shallow.same(None, None, max_new_tokens=6, bos_token_id=7)
    np.testing.assert_array_equal(
        shallow.model.generate(inputs=[[7]], max_new_tokens=6, eos_token_id=[]), answer
    )
    assert shallow.ours(None, None, max_new_tokens=2)[0, 0] == 1, "the config's bos_token_id"


@stored
def their_transition_scores(
    reference: Reference, ids: np.ndarray, mask: np.ndarray, normalize_logits: bool, **options: Any
) -> Any:
    """Returns the reference's transition scores of its own answer."""
    import torch

    reference.model.generation_config.eos_token_id = None
    options |= {"attention_mask": torch.tensor(mask), "pad_token_id": PAD, "do_sample": False}
    out = reference.model.generate(torch.tensor(ids), **options, **RECORDED)
    return reference.model.compute_transition_scores(
        out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [40, 50, 60]}),
    ],
)
def test_transition_scores(shallow: Twins, options: dict[str, Any], normalize: bool) -> None:
    options |= {"max_new_tokens": 8}
    expected = their_transition_scores(shallow.reference, *BATCH, normalize, **options)
    out = shallow.ours(*BATCH, **options, **RECORDED)
    indices = getattr(out, "beam_indices", None)
    scores = shallow.model.compute_transition_scores(out.sequences, out.scores, indices, normalize)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    if options.get("num_beams") and not normalize:
        lengths = (np.asarray(indices) >= 0).sum(axis=1)
        np.testing.assert_allclose(np.asarray(scores).sum(axis=1) / lengths, out.sequences_scores, rtol=1e-5)
        with pytest.raises(ValueError, match="4 sequences come from scores of 6 beams; give beam_indices"):
            shallow.model.compute_transition_scores(out.sequences, out.scores)


def test_scores_must_be_recorded(shallow: Twins) -> None:
    with pytest.raises(
        ValueError, match="call generate with return_dict_in_generate=True and output_scores=True"
    ):
        shallow.model.compute_transition_scores(BATCH[0], None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two names": ({"inputs": [[5]], "input_ids": [[5]]}, "inputs is another name of input_ids"),
    "rows of ids": (
        {"input_ids": [[5, 6], [7]]},
        "input_ids has rows of 1 to 2 entries; pad them to one length",
    ),
    "rows of a mask": (
        {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1]]},
        "attention_mask has rows of 1 to 2 entries; pad them",
    ),
    "position_ids": (
        {"input_ids": [[5]], "position_ids": np.zeros((1, 1), int)},
        r"position_ids=.* is not supported; generation counts positions along attention_mask",
    ),
    "synced_gpus": (
        {"input_ids": [[5]], "synced_gpus": True},
        "all processes of a mesh run the same program",
    ),
    "width": ({"inputs_embeds": EMBEDS[..., 1:]}, r"inputs_embeds has shape \[2, 20, 47\]; expected .* 48\]"),
    "mask": (
        {"inputs_embeds": EMBEDS, "attention_mask": np.ones((2, 19))},
        r"attention_mask has shape \[2, 19\]; expected that of inputs_embeds, \[2, 20\]",
    ),
    "padding": (
        {"inputs_embeds": EMBEDS, "attention_mask": np.zeros((2, 20))},
        "row 0 of inputs_embeds is all padding",
    ),
    "more ids": (
        {"inputs_embeds": EMBEDS, "input_ids": np.full((2, 21), 5)},
        r"input_ids has shape \[2, 21\], and inputs_embeds has 2 rows of 20 positions",
    ),
    "guidance": (
        {"inputs_embeds": EMBEDS, "guidance_scale": 2.0},
        "guidance_scale needs the ids of all tokens",
    ),
    "length": ({"inputs_embeds": EMBEDS, "max_length": 20}, "max_length=20 leaves no room for new tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(shallow: Twins, case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        shallow.model.generate(**arguments)


def test_refuses_an_answer_without_prompt_and_bos() -> None:
    model = Phi3ForCausalLM(small_config(num_hidden_layers=1, bos_token_id=None))
    with pytest.raises(ValueError, match="without input_ids an answer begins with bos_token_id"):
        model.generate(max_new_tokens=2)


NEUTRAL: dict[str, Any] = {
    "synced_gpus": False,
    "custom_generate": None,
    "trust_remote_code": False,
    "position_ids": None,
    "labels": None,
    "inputs_embeds": None,
    "logits_to_keep": 1,
    "output_attentions": False,
    "output_router_logits": False,
    "is_causal": True,
    "return_dict": True,
    "use_cache": True,
    "assistant_model": None,
    "streamer": None,
}


def test_accepts_values_without_effect(shallow: Twins) -> None:
    options = {"max_new_tokens": 4}
    np.testing.assert_array_equal(
        shallow.ours(*BATCH, **options, **NEUTRAL), shallow.theirs(*BATCH, **options)
    )


def test_hints_at_near_names_only() -> None:
    with pytest.raises(TypeError, match="'positions_ids'; did you mean 'position_ids'"):
        GenerationConfig(positions_ids=1)
    with pytest.raises(TypeError, match="no generation setting is called 'verbosity'; see GenerationConfig"):
        GenerationConfig(verbosity=1)


@stored
def arguments_of_theirs() -> dict[str, list[str]]:
    """Returns the names of transformers' arguments, of generate and of a forward."""
    from transformers import Phi3ForCausalLM
    from transformers.utils import TransformersKwargs

    generate, forward = (
        [*inspect.signature(function).parameters][1:-1]
        for function in (Phi3ForCausalLM.generate, Phi3ForCausalLM.forward)
    )
    return {"generate": generate, "forward": sorted({*forward, *TransformersKwargs.__annotations__})}


def parameters(*functions: Callable[..., Any]) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_takes_or_refuses_every_argument_of_transformers() -> None:
    """Generate passes the arguments of a forward on."""
    theirs = arguments_of_theirs()
    assert {"inputs", "synced_gpus"} <= set(theirs["generate"])
    assert {"labels", "seq_idx"} <= set(theirs["forward"])
    known = parameters(GenerationRequest.__init__) | set(checks.RULES) | set(checks.UNSUPPORTED_ARGUMENTS)
    assert known >= {*theirs["generate"], *theirs["forward"]}
    taken = parameters(Phi3Model.__call__, Phi3ForCausalLM.__call__)
    assert taken | set(UNSUPPORTED) >= set(theirs["forward"])
    assert not taken & set(UNSUPPORTED)
