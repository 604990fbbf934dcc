"""`Phi3Tokenizer`: the names and results of a transformers tokenizer, with NumPy arrays."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.runs.text import lone_surrogate

from . import _batching as batching
from . import _chat, _files
from ._backends import Backend, JsonBackend, SpecialTokenLayout
from ._batching import BatchEncoding
from ._stream import IncrementalDecoder, as_ids

logger = logging.getLogger(__name__)

_UNLIMITED = int(1e30)  # transformers' value for a config without a limit
_MEANINGFUL_LIMIT = 10**20
_SETTINGS = {"padding_side": "right", "truncation_side": "right", "model_max_length": _UNLIMITED}


class Phi3Tokenizer:
    """Turns text into ids and back, as transformers does with the same files.

    The files alone decide which special tokens go around a text: tokenizer.json's post-processor, or, without
    a tokenizer.json, `add_bos_token` and `add_eos_token` of the config (as in transformers 5).

    Attributes that may be set: `padding_side`, `truncation_side` ("left" or "right"), `model_max_length`,
    `chat_template` (a template, several by name, or None).
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        *,
        padding_side: Literal["left", "right"] | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """Takes tokenizer_config.json's fields as `config`; the other arguments override it."""
        self.backend = backend
        self._config = dict(config or {})
        self._files: dict[str, bytes] = {}
        backend.add_tokens(_files.added_tokens(self._config))
        self._named = self._name_tokens()
        self.padding_side: str = padding_side or self._setting("padding_side")
        self.truncation_side: str = truncation_side or self._setting("truncation_side")
        batching.check_side("padding_side", self.padding_side)
        batching.check_side("truncation_side", self.truncation_side)
        self.model_max_length = int(model_max_length or self._setting("model_max_length"))
        template = _files.chat_templates(self._config.get("chat_template"))
        self._first_template = template or _chat.default_template(backend.token_to_id, len(backend))
        self.chat_template = self._first_template
        self._single, self._pair = self._layouts()
        self._warned_of_padding = False

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        padding_side: Literal["left", "right"] | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        model_max_length: int | None = None,
    ) -> Self:
        """Reads a tokenizer from a local folder: tokenizer.json, else tokenizer.model with added tokens.

        A folder with tokenizer.model and no tokenizer configuration gets Phi-3's added tokens and flags.

        Raises:
            FileNotFoundError: there is neither file. UserError: a file is broken; the message says where.
        """
        backend, config, files = _files.read_folder(Path(directory))
        tokenizer = cls(
            backend,
            config,
            padding_side=padding_side,
            truncation_side=truncation_side,
            model_max_length=model_max_length,
        )
        tokenizer._files = files
        return tokenizer

    def __len__(self) -> int:
        """Returns the number of tokens with the added ones; the embedding may have more rows."""
        return len(self.backend)

    def __repr__(self) -> str:
        name, _ = self.backend.file
        return f"{type(self).__name__}({name}, {len(self)} tokens, eos_token={self.eos_token!r})"

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones, as in transformers; `len(tokenizer)` counts all."""
        return self.backend.vocab_size

    @property
    def bos_token(self) -> str | None:
        return self._named.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self._named.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self._named.get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self._named.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named_id("unk_token")

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the tokens that the config gives a role, as in transformers.

        `decode(skip_special_tokens=True)` drops more: every token flagged special, `<|user|>` among them.
        """
        tokens = (*self._named.values(), *_files.extra_special_tokens(self._config))
        ids = (self.backend.token_to_id(token) for token in tokens)
        return list(dict.fromkeys(i for i in ids if i is not None))

    @property
    def add_bos_token(self) -> bool:
        """Whether `add_special_tokens=True` puts the bos token first."""
        return self.bos_token_id is not None and self._single[0] == self.bos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens within the text are always recognised."""
        ids = self._ids(text)
        return batching.arrange(self._single, ids, []) if add_special_tokens else ids

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Returns the text of an id or a row of ids (list, NumPy or JAX array); unknown ids have no text.

        Raises:
            TypeError: a value is not an integer. UserError: an id is negative.
        """
        skipped = self.backend.special_ids if skip_special_tokens else frozenset()
        return self.backend.decode([i for i in as_ids(ids) if i not in skipped])

    def batch_decode(self, batch: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """Returns the text of every row."""
        return [self.decode(row, skip_special_tokens) for row in batch]

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Returns a decoder that takes ids as they are generated."""
        return IncrementalDecoder(self, skip_special_tokens)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(
        self, tokens: str | list[str] | tuple[str, ...]
    ) -> int | list[int | None] | None:
        """Returns the id of a token, or of each; the unk token's (or None) for an unknown token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int] | np.ndarray) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: Any) -> str | list[str | None] | None:
        """Returns the token of an id, or of each; None for an id without one."""
        tokens = [self.backend.id_to_token(i) for i in as_ids(ids)]
        return tokens if isinstance(ids, Iterable) and np.ndim(ids) else tokens[0]  # type: ignore[arg-type]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Returns the ids of one text or several as int32 arrays [B, T]; a single text is a batch of one.

        Args:
            text_pair: second texts, one for each text.
            padding: True or "longest", "max_length", or False ("do_not_pad": all rows must be equally long).
            truncation: True or "longest_first", "only_first", "only_second"; without it a text that is longer
                than `max_length` stays whole.
            max_length: the length with special tokens; default, where it is needed: `model_max_length`.

        Raises:
            UserError: there are no texts, unequal rows without padding, no length to cut or pad to, or no pad
                token.
        """
        texts = batching.as_texts(text, "text")
        seconds = None if text_pair is None else batching.as_texts(text_pair, "text_pair")
        if seconds is not None and len(seconds) != len(texts):
            raise UserError(
                f"text has {len(texts)} entries and text_pair {len(seconds)}; expected one for each"
            )
        cut = batching.choice("truncation", truncation, batching.TRUNCATIONS)
        pad = batching.choice("padding", padding, batching.PADDINGS)
        if cut is not None or pad == "max_length":
            max_length = self._limit(max_length)
        layout = self._single if seconds is None else self._pair
        rows = []
        for index, first_text in enumerate(texts):
            first, second = self._ids(first_text), [] if seconds is None else self._ids(seconds[index])
            if cut is not None and max_length is not None:
                room = max_length - batching.overhead(layout) * add_special_tokens
                first, second = batching.truncate(first, second, cut, room, self.truncation_side)
            rows.append(batching.arrange(layout, first, second) if add_special_tokens else first + second)
        width = batching.width(rows, pad, max_length, pad_to_multiple_of)
        fill = 0 if all(len(row) == width for row in rows) else self._padding_id()
        return batching.pad_rows(rows, width, fill, self.padding_side)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[True] = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[False],
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> list[int] | str:
        """Returns the ids of a conversation, or its text; special tokens come from the template only.

        Args:
            messages: dicts with `role` and `content`, in order.
            chat_template: a template, or the name of one of the tokenizer's; default: the tokenizer's own.
            continue_final_message: ends the text within the final message, so that the model continues it.
            template_variables: other variables of the template (`tools`, `documents`, ...); plain data.

        Raises:
            UserError: there is no conversation or no template, or the template failed (with its own message).
        """
        tools = template_variables.get("tools")
        text = _chat.render(
            _chat.choose_template(chat_template, self.chat_template, tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._named, **template_variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save_pretrained(self, directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the files that it was read from, with later changes; returns their paths.

        Files of an earlier tokenizer are removed; all or nothing changes.

        Raises:
            CheckpointError: the disk is full, or the directory cannot be written.
        """
        name, content = self.backend.file
        files = {**self._files, name: content}
        config = json.loads(files[_files.CONFIG]) if _files.CONFIG in files else self._config_to_write()
        changed = {key: getattr(self, key) for key in _SETTINGS if getattr(self, key) != self._setting(key)}
        config |= changed
        new_template = self.chat_template != self._first_template
        if new_template:
            files = {name: content for name, content in files.items() if name not in _files.TEMPLATES}
            config.pop("chat_template", None)
            if isinstance(self.chat_template, str):
                files[_files.TEMPLATE] = self.chat_template.encode("utf-8")
            elif self.chat_template is not None:
                named = self.chat_template.items()
                config["chat_template"] = [{"name": key, "template": value} for key, value in named]
        if changed or new_template or _files.CONFIG not in files:
            files[_files.CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
        _files.write_files(Path(directory), files)
        return tuple(str(Path(directory) / name) for name in files)

    def _config_to_write(self) -> dict[str, Any]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        if _files.TEMPLATE in self._files:
            del config["chat_template"]
        return config

    def _setting(self, key: str) -> Any:
        value = self._config.get(key)
        return _SETTINGS[key] if value is None else value

    def _name_tokens(self) -> dict[str, str]:
        """Returns the config's token for each role, without tokens that the vocabulary lacks."""
        named = {}
        for role in _files.NAMED_TOKENS:
            token = _files.token_text(self._config.get(role))
            token_id = None if token is None else self.backend.token_to_id(token)
            if token is not None and token_id is None:
                logger.warning("%s is %r, which the vocabulary does not have: left out", role, token)
            elif token is not None and token_id is not None:
                named[role] = token
                if token_id not in self.backend.added_tokens:
                    self.backend.add_tokens({token_id: AddedToken(token, special=True, normalized=False)})
        return named

    def _named_id(self, role: str) -> int | None:
        token = self._named.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def _layouts(self) -> tuple[SpecialTokenLayout, SpecialTokenLayout]:
        """Returns the layout of one text and that of a pair."""
        single, pair = self.backend.layout(pair=False), self.backend.layout(pair=True)
        if single is None or pair is None:
            # With a tokenizer.json the two flags have no effect, even if it has no post-processor.
            ignored = isinstance(self.backend, JsonBackend)
            first, last = (
                [] if ignored or token_id is None or not self._config.get(flag) else [token_id]
                for flag, token_id in (
                    ("add_bos_token", self.bos_token_id),
                    ("add_eos_token", self.eos_token_id),
                )
            )
            single = (*first, "A", *last)
            pair = (*single, *first, "B", *last)
        return single, pair

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), got {type(text).__name__} {text!r:.40}")
        try:
            return self.backend.encode(text)
        except (TypeError, RuntimeError) as error:
            if (at := lone_surrogate(text)) is not None:
                raise UserError(
                    f"the text is not valid Unicode: half of a surrogate pair at {at}: {text[at]!r}"
                ) from error
            raise

    def _limit(self, max_length: int | None) -> int:
        if max_length is not None:
            return max_length
        if self.model_max_length > _MEANINGFUL_LIMIT:
            raise UserError("give max_length: this tokenizer's config has no model_max_length")
        return self.model_max_length

    def _padding_id(self) -> int:
        if self.pad_token_id is not None:
            return self.pad_token_id
        if self.eos_token_id is None:
            raise UserError("cannot pad: the tokenizer's config has neither a pad_token nor an eos_token")
        if not self._warned_of_padding:
            self._warned_of_padding = True
            logger.warning(
                "no pad_token in the tokenizer's config: padding with eos_token %r", self.eos_token
            )
        return self.eos_token_id
