"""The rules of `GenerationConfig`: values of single fields, unsupported names, combinations."""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from phi3_jax.config.rope_types import is_number
from phi3_jax.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_tokens(value: Any) -> bool:
    return type(value) is tuple and bool(value) and all(map(_is_count, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_bias(value: Any) -> bool:
    pairs = type(value) is tuple and all(type(pair) is tuple and len(pair) == 2 for pair in value)
    return pairs and bool(value) and all(_is_tokens(tokens) and is_number(bias) for tokens, bias in value)


def _one_of(*choices: Any) -> Rule:
    return f"one of {', '.join(map(repr, choices))}", lambda v: type(v) in map(type, choices) and v in choices


def _number(words: str, holds: Callable[[float], bool] = lambda v: True) -> Rule:
    return words, lambda v: is_number(v) and holds(v)


_flag: Rule = ("True or False", lambda v: type(v) is bool)
_size: Rule = ("a positive integer below 2**31", lambda v: _is_count(v) and v > 0)
_token: Rule = ("a token id (an integer, 0 or more)", _is_count)
_tokens: Rule = ("a list of token ids, not an empty one", _is_tokens)
_fraction = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
_cutoff = _number("a number from 0 (off) to below 1", lambda v: 0 <= v < 1)

# The rule of each field that is set, in words and as a test. Lists have become tuples before. The device
# holds int32 and float32: scores of 1e8 stay finite when they are divided by the smallest numbers here.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), _size),
    **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"), _size),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), _flag),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _flag),
    "return_dict_in_generate": _flag,
    **dict.fromkeys(("min_length", "min_new_tokens"), ("an integer, 0 or more, below 2**31", _is_count)),
    **dict.fromkeys(
        ("top_k", "no_repeat_ngram_size"), ("an integer, 0 (off) or more, below 2**31", _is_count)
    ),
    "early_stopping": _one_of(True, False, "never"),
    "max_time": _number("a positive number of seconds", lambda v: v > 0),
    "stop_strings": (
        "a text or a list of texts, none of them empty",
        lambda v: _is_text(v) or (type(v) is tuple and bool(v) and all(map(_is_text, v))),
    ),
    "use_cache": (
        "True: generation always keeps the cache, which changes no result; leave it out",
        lambda v: v is True,
    ),
    "cache_implementation": _one_of("static", "dynamic", "sliding_window", "quantized"),
    "temperature": _number("0, or a number of at least 1e-30", lambda v: v == 0 or v >= 1e-30),
    **dict.fromkeys(("top_p", "min_p", "assistant_confidence_threshold"), _fraction),
    **dict.fromkeys(("top_h", "typical_p"), _number("above 0 and at most 1 (off)", lambda v: 0 < v <= 1)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), _cutoff),
    "repetition_penalty": _number("a number from 1e-30 to 1e30, such as 1.1", lambda v: 1e-30 <= v <= 1e30),
    **dict.fromkeys(
        ("frequency_penalty", "presence_penalty", "length_penalty", "guidance_scale"),
        _number("a finite number"),
    ),
    **dict.fromkeys(("forced_bos_token_id", "pad_token_id", "bos_token_id"), _token),
    "forced_eos_token_id": ("a token id or a list of them", lambda v: _is_count(v) or _is_tokens(v)),
    "eos_token_id": (
        "a token id or a list of them ([] for no end token)",
        lambda v: _is_count(v) or v == () or _is_tokens(v),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _tokens),
    "bad_words_ids": (
        "a list of lists of token ids, none of them empty",
        lambda v: type(v) is tuple and bool(v) and all(map(_is_tokens, v)),
    ),
    "sequence_bias": (
        "a mapping from tuples of token ids to numbers, such as {(5, 7): -10.0}, or a list of such pairs",
        _is_bias,
    ),
    "exponential_decay_length_penalty": (
        "a pair of a start (an integer, 0 or more) and a factor (a positive number), such as (100, 1.05)",
        lambda v: type(v) is tuple and len(v) == 2 and _is_count(v[0]) and is_number(v[1]) and v[1] > 0,
    ),
    "rope_list": _one_of("switch", "long", "short", "planned"),
}


class Unsupported(NamedTuple):
    """A setting of transformers that is not supported, and its values without effect, which are accepted."""

    neutral: tuple[Any, ...] = ()
    advice: str = ""
    changes_output: bool = True


_beams = "use plain beam search (num_beams)"
_encoder = Unsupported((0, 1.0), "it belongs to encoder-decoder models")
_hosted = Unsupported((False, 0, 0.0, 1), "transformers 5 has removed it too")
_draft = "use assistant_model or prompt_lookup_num_tokens"
_compiled = Unsupported((False,), "everything is compiled here; leave it out", changes_output=False)
_other_vocabulary = Unsupported((10,), "the assistant must share the model's tokenizer", changes_output=False)

UNSUPPORTED: dict[str, Unsupported] = {
    "use_mtp": Unsupported((False,), _draft, changes_output=False),
    "assistant_early_exit": Unsupported((), _draft, changes_output=False),
    "speculation_type": Unsupported((), _draft, changes_output=False),
    "num_assistant_tokens_schedule": Unsupported(
        ("constant",),
        "the number of drafted tokens is 'constant' (num_assistant_tokens)",
        changes_output=False,
    ),
    "assistant_ensemble_weight": Unsupported((), "assisted generation is exact here; leave it out"),
    "assistant_lookbehind": _other_vocabulary,
    "target_lookbehind": _other_vocabulary,
    "is_assistant": Unsupported((False,), "pass the draft model as assistant_model", changes_output=False),
    "cache_config": Unsupported((), "choose with cache_implementation", changes_output=False),
    "max_cache_len": Unsupported((), "cache sizes are rounded up already", changes_output=False),
    "prefill_chunk_size": Unsupported((), "long prompts come in chunks already", changes_output=False),
    "compile_config": _compiled,
    "disable_compile": _compiled,
    "continuous_batching_config": Unsupported((), "pass the prompts as one batch", changes_output=False),
    "low_memory": Unsupported((False,), "use num_beams with a smaller batch", changes_output=False),
    "encoder_repetition_penalty": _encoder,
    "encoder_no_repeat_ngram_size": _encoder,
    "decoder_start_token_id": Unsupported((), "it belongs to encoder-decoder models", changes_output=False),
    "token_healing": Unsupported((False,), "end the prompt at a word's end"),
    "watermarking_config": Unsupported((), "write a logits_processor for it"),
    "penalty_alpha": _hosted._replace(advice="use do_sample=True with top_k (contrastive search is gone)"),
    "dola_layers": _hosted,
    "num_beam_groups": _hosted._replace(advice=_beams),
    "diversity_penalty": _hosted._replace(advice=_beams),
    "constraints": Unsupported((), "use prefix_allowed_tokens_fn or sequence_bias"),
    "force_words_ids": Unsupported((), "use prefix_allowed_tokens_fn or sequence_bias"),
}

UNSUPPORTED_ARGUMENTS: dict[str, Unsupported] = {
    "synced_gpus": Unsupported((False,), "all processes of a mesh run the same program; leave it out"),
    "custom_generate": Unsupported((), "call the model in a loop of your own"),
    "trust_remote_code": Unsupported((False,), "no code comes with a checkpoint; leave it out"),
    "position_ids": Unsupported((), "generation counts positions along attention_mask"),
    "labels": Unsupported((), "for a loss call model(input_ids, labels=labels)"),
    "logits_to_keep": Unsupported((0, 1), "output_logits and output_scores return the logits of each step"),
    "num_items_in_batch": Unsupported((), "for a loss call model(input_ids, labels=labels)"),
    "token_type_ids": Unsupported((), "the model has no types of tokens"),
    "output_router_logits": Unsupported((False,), "the model has no experts"),
    "is_causal": Unsupported((True,), "the model is causal"),
    "return_dict": Unsupported((True,), "set return_dict_in_generate"),
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        Unsupported((), "give each text a row of its own"),
    ),
}
"""As above, for arguments of transformers' generate, and of a forward, which generate passes on."""

_OF_GENERATE = (
    *("inputs", "input_ids", "attention_mask", "inputs_embeds", "generation_config", "inv_freq"),
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "seed", "past_key_values"),
)


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of an unsupported setting has no effect in transformers."""
    neutral = (UNSUPPORTED | UNSUPPORTED_ARGUMENTS)[name].neutral
    return value is None or (isinstance(value, bool | int | float | str) and value in neutral)


def check_names(given: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Returns the supported settings among those given.

    Raises:
        UserError: a setting of transformers is not supported. TypeError: there is no such setting.
    """
    unsupported = UNSUPPORTED | UNSUPPORTED_ARGUMENTS
    for name in given.keys() - set(fields):
        value = given[name]
        if name in _OF_GENERATE:
            raise TypeError(f"{name} is an argument of generate(), not of its configuration; pass it there")
        if name not in unsupported:
            close = sorted(field for field in fields if field.startswith(f"{name}_"))
            close += difflib.get_close_matches(name, [*fields, *_OF_GENERATE, *unsupported], n=1, cutoff=0.75)
            hint = f"did you mean {close[0]!r}?" if close else "see GenerationConfig for all settings"
            raise TypeError(f"no generation setting is called {name!r}; {hint}")
        if not is_neutral(name, value):
            raise UserError(f"{name}={value!r:.60} is not supported; {unsupported[name].advice}")
    return {name: value for name, value in given.items() if name in fields}


def check_values(values: Mapping[str, Any]) -> None:
    """Raises UserError for the first value that breaks its field's rule."""
    for name, value in values.items():
        expected, holds = RULES[name]
        if value is not None and not holds(value):
            raise UserError(f"{name}={value!r:.80} must be {expected}")


# Fields without effect unless another field has a value: their neutral values; the need, as test and advice.
_Needs = tuple[str, Callable[[Any], bool], str]
_sampling: _Needs = ("do_sample", lambda v: v is True, "do_sample=True")
_several_beams: _Needs = ("num_beams", lambda v: v > 1, "num_beams above 1")
_outputs: _Needs = ("return_dict_in_generate", lambda v: v is True, "return_dict_in_generate=True")
_NEEDED: dict[str, tuple[tuple[Any, ...], _Needs]] = {
    "temperature": ((0, 1), _sampling),  # 0 is how others spell greedy
    "top_k": ((50, 0), _sampling),
    "top_p": ((1,), _sampling),
    "min_p": ((0,), _sampling),
    "top_h": ((), _sampling),
    "typical_p": ((1,), _sampling),
    "epsilon_cutoff": ((0,), _sampling),
    "eta_cutoff": ((0,), _sampling),
    "early_stopping": ((False,), _several_beams),
    "length_penalty": ((1,), _several_beams),
    **{name: ((False,), _outputs) for name in RULES if name.startswith("output_")},
}


def check_together(values: Mapping[str, Any], explicit: Collection[str]) -> None:
    """Raises UserError for settings that contradict each other.

    `values` is complete. Settings without effect are an error only if they are `explicit`, that is given by
    the caller; a model's own file may have them.
    """
    for name, (neutral, (other, holds, advice)) in _NEEDED.items():
        value = values[name]
        if name in explicit and value is not None and value not in neutral and not holds(values[other]):
            raise UserError(
                f"{name}={value!r:.80} has no effect with {other}={values[other]!r}; set {advice}, or leave "
                f"{name} out"
            )
    if values["do_sample"] and values["temperature"] == 0:
        raise UserError("temperature=0 cannot be sampled from; use do_sample=False for the most likely token")
    beams, returned = values["num_beams"], values["num_return_sequences"]
    if returned > beams > 1:
        raise UserError(f"num_return_sequences={returned} is more than num_beams={beams}; raise num_beams")
    if returned > 1 and beams == 1 and not values["do_sample"]:
        raise UserError(
            f"num_return_sequences={returned} would be {returned} times the same greedy answer; set "
            f"do_sample=True, or num_beams={returned} or more"
        )
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = as_tuple(values[name])
        if forced and set(forced) <= set(values["suppress_tokens"] or ()):
            raise UserError(
                f"{name}={values[name]!r} is in suppress_tokens too, so that no token is left; remove it "
                "from one of them (min_new_tokens delays the end)"
            )


def check_vocabulary(values: Mapping[str, Any], vocab_size: int) -> None:
    """Raises UserError for a token id that the model does not have."""
    for name, value in values.items():
        if name == "sequence_bias":
            value = tuple(tokens for tokens, _ in value or ())
        elif not (name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens")):
            value = value if name == "bad_words_ids" else None
        for token in as_tuple(value):
            for single in as_tuple(token):
                if single >= vocab_size:
                    raise UserError(
                        f"{name} names the token {single}, which is outside the vocabulary; with "
                        f"vocab_size={vocab_size} use 0 to {vocab_size - 1}"
                    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns the value as a tuple: () for None, and a tuple as it is."""
    return () if value is None else value if isinstance(value, tuple) else (value,)
