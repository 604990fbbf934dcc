"""Builds the logits processors of a generation config, checked and in the reference's order."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.generation import processors as rules
from phi3_jax.generation import warpers


def logits_processors(
    config: Any,
    *,
    prompt_length: int,
    max_new_tokens: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    user: Sequence[Any] = (),
) -> tuple[Any, ...]:
    """Returns the processors of `config`, those of `user` and, with `do_sample`, those of the distribution.

    Order and meaning are those of transformers' `_get_logits_processor`. `config` has the attributes of a
    GenerationConfig; one that is missing or None is off. `prompt_length` includes padding. A user's processor
    replaces one of the same class, as in the reference; other callables are returned as they are. End tokens
    outside the vocabulary are left out: -1 means "never".

    Raises:
        UserError: a setting is not valid; the message has its name, its value and what it may be.
    """
    settings = _CheckedConfig(config, vocab_size)
    ends = np.unique([token for token in eos_token_ids if 0 <= token < vocab_size]).astype(np.int32)
    chain = [
        *_on_sequences(settings, ends),
        *_on_positions(settings, ends, prompt_length, max_new_tokens),
    ]
    chain = [next((own for own in user if type(own) is type(each)), each) for each in chain]
    chain += [own for own in user if not any(own is each for each in chain)]
    if settings.value("do_sample"):
        beams = settings.integer("num_beams", low=1) or 1
        chain += _on_distribution(
            settings, min_tokens_to_keep=1 if beams == 1 else max(len(eos_token_ids), 1) + 1
        )
    if settings.value("renormalize_logits"):
        chain.append(rules.LogitNormalization())
    return tuple(chain)


class _CheckedConfig:
    """Reads a generation config with checks; every method returns None for a setting that is not set."""

    def __init__(self, config: Any, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size

    def value(self, name: str) -> Any:
        return getattr(self.config, name, None)

    def number(self, name: str, low: float, high: float, interval: str, hint: str = "") -> float | None:
        """Returns the number `name`, which must lie in `interval`, for instance "(0, 1]"."""
        value = self.value(name)
        if value is None:
            return None
        above = _is_real(value) and (value >= low if interval[0] == "[" else value > low)
        if not above or not (value <= high if interval[-1] == "]" else value < high):
            raise UserError(f"{name}={value!r} must be a number in {interval}{hint}")
        return float(value)

    def integer(self, name: str, low: int, hint: str = "") -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if not _is_integer(value) or value < low:
            raise UserError(f"{name}={value!r} must be an integer of at least {low}{hint}")
        return int(value)

    def tokens(self, name: str) -> Int[np.ndarray, " N"] | None:
        """Returns the token ids `name` without duplicates; a single id counts as a list."""
        value = self.value(name)
        if value is None:
            return None
        listed = [value] if _is_integer(value) else _as_list(value)
        if listed is None:
            raise UserError(f"{name}={value!r} must be a list of token ids")
        return np.unique(self.checked(name, listed)).astype(np.int32)

    def checked(self, name: str, tokens: Sequence[Any]) -> tuple[int, ...]:
        for token in tokens:
            if not _is_integer(token) or not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{name} names token {token!r}; the vocabulary's ids are 0 to {self.vocab_size - 1}"
                )
        return tuple(int(token) for token in tokens)

    def sequence_bias(self) -> dict[tuple[int, ...], float] | None:
        name, value = "sequence_bias", self.value("sequence_bias")
        if value is None:
            return None
        pairs = list(value.items()) if isinstance(value, dict) else _as_list(value)
        expected = "a dict from tuples of token ids to biases, or a list of [token ids, bias], and not empty"
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise UserError(f"{name}={value!r} must be {expected}")
        return {self.checked(name, tokens): float(bias) for tokens, bias in pairs}

    def bad_words(self, ends: Int[np.ndarray, " E"]) -> dict[tuple[int, ...], float] | None:
        """Returns bad words as biases; an end token alone is not a bad word, as in the reference."""
        name, value = "bad_words_ids", self.value("bad_words_ids")
        if value is None:
            return None
        words = [_as_list(word) for word in _as_list(value) or ()]
        if not words or not all(words):
            raise UserError(f"{name}={value!r} must be a list of lists of token ids, and none empty")
        checked = [self.checked(name, word or ()) for word in words]
        biases = {word: -math.inf for word in checked if len(word) > 1 or word[0] not in ends}
        if not biases:
            raise UserError(
                f"{name}={value!r} has only end tokens, which it cannot forbid; use suppress_tokens"
            )
        return biases


def _on_sequences(settings: _CheckedConfig, ends: Int[np.ndarray, " E"]) -> list[rules.LogitsProcessor]:
    """Returns the processors that depend on the earlier tokens."""
    chain: list[rules.LogitsProcessor] = []
    if (biases := settings.sequence_bias()) is not None:
        chain.append(rules.SequenceBiasLogitsProcessor(*_table(biases)))
    if (penalty := settings.number("repetition_penalty", 0, math.inf, "(0, inf)")) not in (None, 1.0):
        chain.append(rules.RepetitionPenaltyLogitsProcessor(penalty))
    if penalty := settings.number("frequency_penalty", -math.inf, math.inf, "(-inf, inf)"):
        chain.append(rules.FrequencyPenaltyLogitsProcessor(penalty))
    if penalty := settings.number("presence_penalty", -math.inf, math.inf, "(-inf, inf)"):
        chain.append(rules.PresencePenaltyLogitsProcessor(penalty))
    if size := settings.integer("no_repeat_ngram_size", low=0, hint="; 0 allows repetitions"):
        chain.append(rules.NoRepeatNGramLogitsProcessor(size))
    if (biases := settings.bad_words(ends)) is not None:
        chain.append(rules.NoBadWordsLogitsProcessor(*_table(biases)))
    return chain


def _on_positions(
    settings: _CheckedConfig, ends: Int[np.ndarray, " E"], prompt_length: int, max_new_tokens: int
) -> list[rules.LogitsProcessor]:
    """Returns the processors that depend on the number of tokens, or on nothing."""
    chain: list[rules.LogitsProcessor] = []
    min_new_tokens = settings.integer("min_new_tokens", low=0)
    min_length = settings.integer("min_length", low=0)
    if min_new_tokens is None:
        min_new_tokens = (min_length or 0) - prompt_length
    if min_new_tokens > 0 and len(ends):
        chain.append(rules.MinNewTokensLengthLogitsProcessor(min_new_tokens, ends))
    forced_bos = settings.value("forced_bos_token_id")
    if forced_bos is not None:
        (forced_bos,) = settings.checked("forced_bos_token_id", [forced_bos])
        if prompt_length <= 1:
            chain.append(rules.ForcedBOSTokenLogitsProcessor(forced_bos, at=1 - prompt_length))
    if (forced_eos := settings.tokens("forced_eos_token_id")) is not None:
        if not len(forced_eos):
            raise UserError("forced_eos_token_id=[] must name a token; None forces none")
        chain.append(rules.ForcedEOSTokenLogitsProcessor(max_new_tokens, forced_eos))
    if settings.value("remove_invalid_values"):
        chain.append(rules.InfNanRemoveLogitsProcessor())
    if (decay := settings.value("exponential_decay_length_penalty")) is not None:
        chain.append(_decay(decay, ends))
    if (tokens := settings.tokens("suppress_tokens")) is not None and len(tokens):
        chain.append(rules.SuppressTokensLogitsProcessor(tokens))
    if (tokens := settings.tokens("begin_suppress_tokens")) is not None and len(tokens):
        at = 1 if prompt_length <= 1 and forced_bos is not None else 0
        chain.append(rules.SuppressTokensAtBeginLogitsProcessor(tokens, at))
    return chain


def _on_distribution(settings: _CheckedConfig, min_tokens_to_keep: int) -> list[rules.LogitsProcessor]:
    """Returns the processors that shape the distribution that a token is drawn from."""
    chain: list[rules.LogitsProcessor] = []
    greedy = "; for the most likely token each time set do_sample=False"
    if (temperature := settings.number("temperature", 0, math.inf, "(0, inf)", greedy)) not in (None, 1.0):
        chain.append(warpers.TemperatureLogitsWarper(temperature))
    if (share := settings.number("top_h", 0, 1, "(0, 1]")) is not None:
        chain.append(warpers.TopHLogitsWarper(share))
    if k := settings.integer("top_k", low=0, hint="; 0 keeps every token"):
        chain.append(warpers.TopKLogitsWarper(k, min_tokens_to_keep))
    if (p := settings.number("top_p", 0, 1, "[0, 1]", "; 1 keeps every token")) not in (None, 1.0):
        chain.append(warpers.TopPLogitsWarper(p, min_tokens_to_keep))
    if p := settings.number("min_p", 0, 1, "[0, 1]"):
        chain.append(warpers.MinPLogitsWarper(p, min_tokens_to_keep))
    if (mass := settings.number("typical_p", 0, 1, "(0, 1]", "; 1 keeps every token")) not in (None, 1.0):
        chain.append(warpers.TypicalLogitsWarper(mass, min_tokens_to_keep))
    if epsilon := settings.number("epsilon_cutoff", 0, 1, "[0, 1)", "; 0 keeps every token"):
        chain.append(warpers.EpsilonLogitsWarper(epsilon, min_tokens_to_keep))
    if epsilon := settings.number("eta_cutoff", 0, 1, "[0, 1)", "; 0 keeps every token"):
        chain.append(warpers.EtaLogitsWarper(epsilon, min_tokens_to_keep))
    return chain


def _decay(decay: Any, ends: Int[np.ndarray, " E"]) -> rules.ExponentialDecayLengthPenalty:
    name = "exponential_decay_length_penalty"
    pair = _as_list(decay) or []
    if len(pair) != 2 or not _is_integer(pair[0]) or pair[0] < 0 or not _is_real(pair[1]) or pair[1] <= 0:
        raise UserError(f"{name}={decay!r} must be (start, factor): an integer from 0 and a number above 0")
    if not len(ends):
        raise UserError(
            f"{name}={decay!r} raises the end tokens' scores, and there are none; set eos_token_id"
        )
    return rules.ExponentialDecayLengthPenalty(int(pair[0]), math.log(pair[1]), ends)


def _table(biases: dict[tuple[int, ...], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prefixes, aligned on the right in a table of -1, the tokens after them, and the biases."""
    prefixes = np.full((len(biases), max(map(len, biases)) - 1), -1, np.int32)
    for row, (*prefix, _) in enumerate(biases):
        prefixes[row, prefixes.shape[1] - len(prefix) :] = prefix
    last = np.array([sequence[-1] for sequence in biases], np.int32)
    return prefixes, last, np.array(list(biases.values()), np.float32)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_pair(pair: Any) -> bool:
    """Returns whether this is (token ids, bias): at least one id and a number."""
    parts = _as_list(pair) or []
    return len(parts) == 2 and bool(_as_list(parts[0])) and _is_real(parts[1]) and not math.isnan(parts[1])


def _as_list(value: Any) -> list[Any] | None:
    """Returns a sequence or array as a list, and None for anything else."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
