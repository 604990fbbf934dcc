"""Requests in, answers out: texts, templates and stops around continuous batching."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import jax
from jinja2 import TemplateError

from phi3_jax.batch.answers import Answer
from phi3_jax.batch.continuous import Continuation, ContinuousBatch, Load, Prompt, columns_of
from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefixes import Prefixes
from phi3_jax.batch.requests import BadRequestError, Request, parse_object
from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.batch.sizes import choose_pools
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_capacity
from phi3_jax.generation.stopping import StopStringCriteria
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.sharding import shards
from phi3_jax.tokenizer import Phi3Tokenizer

SAMPLE = 256
"""Requests that are looked at before slots are made."""

SLOTS = {"cpu": 48}
"""By platform; a CPU has little to gain from more rows in a product, and idle slots cost it time."""
MOST_SLOTS = 256


COLUMNS = 128
"""Of which the longest slots have a multiple, as kernels like it."""

LONGEST_SHARE = 0.25
"""Of memory, which the longest request may take unless the user says more."""


@dataclass(frozen=True)
class _Asked:
    """What a continuation must know to become an answer."""

    request: Request
    prompt_tokens: int
    stops: tuple[str, ...]


class Engine:
    """Answers requests by continuous batching: `for answer in Engine(model, tokenizer).run(requests)`.

    A fixed set of programs is compiled, however many requests come. Each answer is what `generate` gives for
    its prompt alone, up to the rounding of products of other sizes.

    Args:
        model, tokenizer: of one checkpoint, such as a `Pipeline` has. On a mesh the slots are divided.
        max_new_tokens: of requests that do not say.
        slots: prompts that are answered at a time; default: by memory, at most 48 on CPU and 256 elsewhere.
        max_length: tokens of prompt and answer together, at most; default: the model's context, or what a
            quarter of the memory for them holds. Answers end there; longer prompts are refused.
        options: defaults of what else requests may say: `stop_strings`, `temperature` (0: the likeliest
            token), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `frequency_penalty`,
            `presence_penalty`, `min_new_tokens`, `seed`. The checkpoint's generation_config.json says what
            ends an answer, and nothing else.

    Raises:
        ValueError: options that cannot be; a length that the model or the memory has not.
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
        self._max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        stops = options.pop("stop_strings", ())
        self._stop_strings = (stops,) if isinstance(stops, str) else tuple(stops)
        self._criteria(self._stop_strings)
        if unknown := sorted(options.keys() - RowOptions.__dataclass_fields__.keys()):
            raise UserError(
                f"there is no option {unknown[0]!r}; use {', '.join(RowOptions.__dataclass_fields__)}"
            )
        self._options = RowOptions.of(options, RowOptions())
        self._slots = None if slots is None else _whole("slots", slots)
        context = self.compiled.model.config.context_length
        if max_length is not None and not 2 <= max_length <= context:
            raise UserError(f"max_length={max_length} must be from 2 to the model's context of {context}")
        self._room = token_capacity(self.compiled)
        if max_length is not None and max_length >= self._room:
            raise UserError(
                f"max_length={max_length}: memory holds the keys and values of {self._room} tokens; choose a "
                "smaller one"
            )
        longest = int(LONGEST_SHARE * self._room)
        self.max_length = min(context, longest) if max_length is None else max_length
        self._given_length = max_length
        end = self.compiled.model.generation_config.eos_token_id
        self._end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
        self._batch: ContinuousBatch | None = None
        self.pools: list[PoolSize] = []
        """The slots, once the first requests have been seen."""

    @property
    def load(self) -> Load:
        """How much of the slots is in use."""
        return Load(0, 0, 0) if self._batch is None else self._batch.load

    def run(
        self, requests: Iterable[Request | BadRequestError | Mapping[str, Any]]
    ) -> Iterator[Answer | BadRequestError]:
        """Answers as they finish; requests are taken as slots come free, but the first 256 at once.

        Args:
            requests: as `read_requests` gives them, or objects like its lines: `{"id": 7, "prompt": "..."}`.

        Yields:
            For each request its answer, or what is wrong with it.
        """
        prompts: Iterator[Prompt | BadRequestError] = map(self._prompt, _numbered(requests))
        first = list(islice(prompts, SAMPLE))
        batch = self._batch_for(
            [one for one in first if isinstance(one, Prompt)], all_known=len(first) < SAMPLE
        )
        for found in batch.run(chain(first, prompts)):
            yield self._answer(found) if isinstance(found, Continuation) else found

    def _batch_for(self, first: list[Prompt], *, all_known: bool) -> ContinuousBatch:
        """The slots, made for these requests if there are none that hold them."""
        needs = [(columns_of(len(one.ids), one.max_new_tokens), one.max_new_tokens) for one in first]
        columns = self.max_length + 1
        if all_known and self._given_length is None:
            columns = max((columns for columns, _ in needs), default=COLUMNS)
        if self._batch is not None and columns <= self.pools[-1].columns:
            return self._batch
        self._batch = None  # its memory is wanted
        columns = min(-(-columns // COLUMNS) * COLUMNS, self._room)
        slots = self._slots or SLOTS.get(jax.default_backend(), MOST_SLOTS)
        self.pools = choose_pools(
            needs,
            slots=slots,
            columns=columns,
            room=self._room,
            multiple=shards(self.compiled.mesh, "batch"),
        )
        self._batch = ContinuousBatch(
            self.compiled, self.pools, end_tokens=self._end_tokens, prefixes=Prefixes()
        )
        return self._batch

    def _prompt(self, request: Request | BadRequestError) -> Prompt | BadRequestError:
        if isinstance(request, BadRequestError):
            return request

        def refused(code: str, error: object) -> BadRequestError:
            return BadRequestError(
                request.line,
                code,
                f"line {request.line}: {error}",
                id=request.id,
                openai=request.openai is not None,
            )

        said = dict(request.options)
        try:
            most = _whole("max_new_tokens", said.pop("max_new_tokens", self._max_new_tokens))
            stops = said.pop("stop_strings", self._stop_strings)
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            criteria = self._criteria(stops)
            options = RowOptions.of(said, self._options)
        except (ValueError, TypeError) as error:
            return refused("invalid_option", error)
        try:
            ids = self._encoded(request)
        except (ValueError, TypeError, TemplateError) as error:
            return refused("invalid_messages", error)
        if not ids:
            return refused("invalid_request", "the prompt has no tokens")
        if len(ids) >= self.max_length:
            return refused(
                "prompt_too_long",
                f"the prompt has {len(ids)} tokens; with an answer there may be {self.max_length}",
            )
        asked = _Asked(request, len(ids), stops)
        most = min(most, self.max_length - len(ids))
        return Prompt(asked, ids, most, options, None if criteria is None else criteria.completed)

    def _encoded(self, request: Request) -> list[int]:
        if request.messages is None:
            assert request.prompt is not None
            return self.tokenizer.encode(request.prompt)
        return self.tokenizer.apply_chat_template(request.messages, add_generation_prompt=True)

    def _criteria(self, stops: tuple[str, ...]) -> StopStringCriteria | None:
        return _criteria(self.tokenizer, stops) if stops else None

    def _answer(self, found: Continuation) -> Answer:
        asked: _Asked = found.key
        text = self.tokenizer.decode(found.tokens, skip_special_tokens=True)
        if asked.request.openai is not None:  # that form leaves the text out at which an answer stops
            text = text[: min((at for stop in asked.stops if (at := text.find(stop)) >= 0), default=None)]
        return Answer(asked.request, text, found.finish_reason, asked.prompt_tokens, len(found.tokens))


def _numbered(
    requests: Iterable[Request | BadRequestError | Mapping[str, Any]],
) -> Iterator[Request | BadRequestError]:
    for number, request in enumerate(requests, start=1):
        if isinstance(request, Request | BadRequestError):
            yield request
            continue
        try:
            yield parse_object(dict(request), number)
        except BadRequestError as error:
            yield error


@lru_cache(maxsize=64)
def _criteria(tokenizer: Phi3Tokenizer, stops: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(tokenizer, stops)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number, at least 1")
    return value
