"""Answers requests: texts, chat templates and stop strings around continuous batching."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import jax

from phi3_jax.batch.answers import Answer
from phi3_jax.batch.continuous import Continuation, ContinuousBatch, Load, Prompt, slot_length
from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.pools import LENGTH_MULTIPLE, choose_pools, holds
from phi3_jax.batch.prefixes import PrefixFinder
from phi3_jax.batch.requests import BadRequestError, Request, parse_object
from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_capacity
from phi3_jax.generation.stopping import StopStringCriteria
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.sharding import shards
from phi3_jax.sizes import round_up
from phi3_jax.tokenizer import Phi3Tokenizer

SAMPLE = 256
"""The number of requests that are read before the slots are chosen."""

CPU_SLOTS, OTHER_SLOTS = 48, 256
"""The most slots by platform; on a CPU more rows gain little, and idle slots cost time."""

LONGEST_SHARE = 0.25
"""The share of memory that the longest request may take unless `max_length` is given."""


@dataclass(frozen=True)
class _PromptKey:
    """The parts of a request that turn a continuation into an answer."""

    request: Request
    prompt_tokens: int
    stop_strings: tuple[str, ...]


class Engine:
    """Answers requests by continuous batching: `for answer in Engine(model, tokenizer).run(requests)`.

    A fixed set of programs is compiled, whatever the number of requests. Each answer is that of `generate`
    for its prompt alone, except for the rounding of matrix products of different sizes.

    Args:
        model, tokenizer: those of one checkpoint, such as a `Pipeline` has. On a mesh the slots are divided.
        max_new_tokens: the default for requests without their own.
        slots: the prompts that are answered at a time; default: by memory, at most 48 on CPU and 256
            elsewhere.
        max_length: the most tokens of prompt and answer together; default: the model's context, or what a
            quarter of the memory holds. Answers end there, and longer prompts are rejected.
        options: the defaults of the other options of requests: `stop_strings`, `temperature` (0: greedy
            search), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `frequency_penalty`,
            `presence_penalty`, `min_new_tokens`, `seed`. From the checkpoint's generation_config.json only
            the end tokens are used.

    Raises:
        UserError: an option is invalid, or the length exceeds the model's context or the memory.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM | CompiledModel,
        tokenizer: Phi3Tokenizer,
        *,
        max_new_tokens: int = 512,
        slots: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ):
        self.compiled = model if isinstance(model, CompiledModel) else CompiledModel(model)
        self.tokenizer = tokenizer
        self._max_new_tokens = _check_count("max_new_tokens", max_new_tokens)
        self._stop_strings = _as_tuple(options.pop("stop_strings", ()))
        self._stop_criteria(self._stop_strings)
        if unknown := sorted(options.keys() - RowOptions.__dataclass_fields__.keys()):
            raise UserError(
                f"there is no option {unknown[0]!r}; use {', '.join(RowOptions.__dataclass_fields__)}"
            )
        self._options = RowOptions.of(options, RowOptions())
        self._slots = None if slots is None else _check_count("slots", slots)
        context = self.compiled.model.config.context_length
        if max_length is not None and not 2 <= max_length <= context:
            raise UserError(f"max_length={max_length} must be from 2 to the model's context of {context}")
        self._capacity = token_capacity(self.compiled)
        if max_length is not None and max_length >= self._capacity:
            raise UserError(
                f"max_length={max_length}: memory holds the keys and values of {self._capacity} tokens; "
                "choose a smaller one"
            )
        self._given_max_length = max_length
        self.max_length = max_length or min(context, int(LONGEST_SHARE * self._capacity))
        end = self.compiled.model.generation_config.eos_token_id
        self._end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
        self._batch: ContinuousBatch | None = None
        self._for_few = False
        """Whether `_batch` has just a slot for each of a few requests."""
        self.pools: list[PoolSize] = []
        """The slots, which are chosen when the first requests are known."""

    @property
    def load(self) -> Load:
        """The current load of the slots."""
        return Load(0, 0, 0) if self._batch is None else self._batch.load

    def run(
        self, requests: Iterable[Request | BadRequestError | Mapping[str, Any]]
    ) -> Iterator[Answer | BadRequestError]:
        """Yields an answer or an error for each request, in the order in which they finish.

        The first 256 requests are read at once, all others as slots become free.

        Args:
            requests: as from `read_requests`, or objects like its lines: `{"id": 7, "prompt": "..."}`.
        """
        prompts: Iterator[Prompt | BadRequestError] = map(self._prompt, _parse_objects(requests))
        first = list(islice(prompts, SAMPLE))
        batch = self._batch_for(
            [prompt for prompt in first if isinstance(prompt, Prompt)], complete=len(first) < SAMPLE
        )
        for result in batch.run(chain(first, prompts)):
            yield self._answer(result) if isinstance(result, Continuation) else result

    def _batch_for(self, first: list[Prompt], *, complete: bool) -> ContinuousBatch:
        """Returns a batch whose slots hold the requests; `complete`: there are only those of `first`."""
        needs = [(slot_length(len(each.ids), each.max_new_tokens), each.max_new_tokens) for each in first]
        length = self.max_length + 1
        if complete and self._given_max_length is None:
            length = max((need for need, _ in needs), default=LENGTH_MULTIPLE)
        slots = self._slots or default_slots()
        for_few = complete and len(first) < slots
        pools = choose_pools(
            needs,
            slots=slots,
            length=min(round_up(length, LENGTH_MULTIPLE), self._capacity),
            capacity=self._capacity,
            multiple=shards(self.compiled.mesh, "batch"),
            complete=complete,
        )
        enough = not self._for_few or (for_few and holds(self.pools, pools))
        if self._batch is not None and length <= self.pools[-1].length and enough:
            return self._batch
        self._batch = None  # frees its memory
        self.pools, self._for_few = pools, for_few
        self._batch = ContinuousBatch(
            self.compiled, self.pools, end_tokens=self._end_tokens, prefixes=PrefixFinder()
        )
        return self._batch

    def _prompt(self, request: Request | BadRequestError) -> Prompt | BadRequestError:
        if isinstance(request, BadRequestError):
            return request

        def error(code: str, reason: object) -> BadRequestError:
            message, openai = f"{request.place}: {reason}", request.openai is not None
            return BadRequestError(
                request.line, code, message, id=request.id, openai=openai, file=request.file
            )

        options = dict(request.options)
        try:
            max_new_tokens = _check_count(
                "max_new_tokens", options.pop("max_new_tokens", self._max_new_tokens)
            )
            stop_strings = _as_tuple(options.pop("stop_strings", self._stop_strings))
            criteria = self._stop_criteria(stop_strings)
            row_options = RowOptions.of(options, self._options)
        except (ValueError, TypeError) as exception:
            return error("invalid_option", exception)
        try:
            ids = self._encode(request)
        except (ValueError, TypeError) as exception:
            return error("invalid_messages", exception)
        if not ids:
            return error("invalid_request", "the prompt has no tokens")
        if len(ids) >= self.max_length:
            reason = f"the prompt has {len(ids)} tokens; prompt and answer may have {self.max_length}"
            return error("prompt_too_long", reason)
        return Prompt(
            _PromptKey(request, len(ids), stop_strings),
            ids,
            min(max_new_tokens, self.max_length - len(ids)),
            row_options,
            None if criteria is None else criteria.completed,
        )

    def _encode(self, request: Request) -> list[int]:
        if request.messages is None:
            assert request.prompt is not None
            return self.tokenizer.encode(request.prompt)
        return self.tokenizer.apply_chat_template(
            request.messages, tools=request.tools, add_generation_prompt=True
        )

    def _stop_criteria(self, stop_strings: tuple[str, ...]) -> StopStringCriteria | None:
        return _stop_criteria(self.tokenizer, stop_strings) if stop_strings else None

    def _answer(self, continuation: Continuation) -> Answer:
        key: _PromptKey = continuation.key
        text = self.tokenizer.decode(continuation.tokens, skip_special_tokens=True)
        if key.request.openai is not None:  # in OpenAI's form the text ends before the stop string
            text = text[
                : min((at for stop in key.stop_strings if (at := text.find(stop)) >= 0), default=None)
            ]
        tokens = len(continuation.tokens)
        return Answer(key.request, text, continuation.finish_reason, key.prompt_tokens, tokens)


def default_slots() -> int:
    """Returns the most slots for the platform."""
    return CPU_SLOTS if jax.default_backend() == "cpu" else OTHER_SLOTS


def _parse_objects(
    requests: Iterable[Request | BadRequestError | Mapping[str, Any]],
) -> Iterator[Request | BadRequestError]:
    """Yields the requests; objects are parsed as the lines of a file are."""
    for number, request in enumerate(requests, start=1):
        if isinstance(request, Request | BadRequestError):
            yield request
            continue
        try:
            yield parse_object(dict(request), number)
        except BadRequestError as error:
            yield error


@lru_cache(maxsize=64)
def _stop_criteria(tokenizer: Phi3Tokenizer, stop_strings: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(tokenizer, stop_strings)


def _as_tuple(stop_strings: Any) -> tuple[str, ...]:
    return (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)


def _check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number, at least 1")
    return value
