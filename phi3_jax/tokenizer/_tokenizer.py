"""`Phi3Tokenizer`: the names and results of a transformers tokenizer, with NumPy arrays."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.runs.arguments import refuse
from phi3_jax.runs.text import lone_surrogate
from phi3_jax.sources.hub import is_hub_name, resolve
from phi3_jax.storage.targets import target_in
from phi3_jax.storage.urls import is_url

from . import _batching as batching
from . import _chat, _files
from ._arguments import CALL, CHAT, DECODE, ENCODE, LOAD, PAD
from ._backends import Backend, JsonBackend, Pieces, SpecialTokenLayout
from ._batching import BatchEncoding
from ._stream import IncrementalDecoder, as_ids
from ._vocabulary import EXTRA_TOKENS, Vocabulary

logger = logging.getLogger(__name__)

_UNLIMITED = int(1e30)  # transformers' value for a config without a limit
_MEANINGFUL_LIMIT = 10**20
_Ids = TypeVar("_Ids")
_SETTINGS = {"padding_side": "right", "truncation_side": "right", "model_max_length": _UNLIMITED}


class Phi3Tokenizer(Vocabulary):
    """Turns text into ids and back, as transformers does with the same files.

    The files alone decide which special tokens go around a text: tokenizer.json's post-processor, or, without
    a tokenizer.json, `add_bos_token` and `add_eos_token` of the config (as in transformers 5).

    Attributes that may be set: `padding_side`, `truncation_side` ("left" or "right"), `model_max_length`,
    `chat_template` (a template, several by name, or None), and the tokens with a role, such as `pad_token`.
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
        super().__init__(backend, config or {})
        self._files: dict[str, bytes] = {}
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
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        padding_side: Literal["left", "right"] | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        model_max_length: int | None = None,
        chat_template: str | dict[str, str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **more: Any,
    ) -> Self:
        """Reads a tokenizer from a local folder, a GGUF file or a name on the Hub.

        A folder has tokenizer.json, else tokenizer.model with added tokens, else Phi-3-small's
        `cl100k_base.tiktoken`. One with tokenizer.model and no tokenizer configuration gets Phi-3's added
        tokens and flags. From the Hub only the tokenizer's files are fetched.

        Args:
            pretrained_model_name_or_path: the folder, the `.gguf` file, or `org/name`.
            padding_side, truncation_side, model_max_length, chat_template: in place of the files'.
            revision, token, cache_dir, local_files_only: for the Hub, as in `from_pretrained` of a model.
            more: tokens with a role, such as `pad_token="<pad>"`, added where the vocabulary lacks them.

        Raises:
            FileNotFoundError: there is no tokenizer. UserError: a file is broken; the message says where.
            CheckpointError: the files cannot be fetched.
        """
        roles = {name: more.pop(name) for name in (*_files.NAMED_TOKENS, *EXTRA_TOKENS) if name in more}
        refuse("from_pretrained", more, LOAD, (*_LOAD_ARGUMENTS, *_files.NAMED_TOKENS))
        path = Path(pretrained_model_name_or_path).expanduser()
        name = os.fspath(pretrained_model_name_or_path)
        is_text = isinstance(pretrained_model_name_or_path, str)
        if is_url(name) or (not path.exists() and is_text and is_hub_name(name)):
            hub: Any = {"revision": revision, "token": token, "cache_dir": cache_dir}
            path = resolve(name, local_files_only=local_files_only, tokenizer_only=True, **hub)
        is_gguf = path.suffix == ".gguf" and path.is_file()
        backend, config, files = _files.read_gguf(path) if is_gguf else _files.read_folder(path)
        tokenizer = cls(
            backend,
            config,
            padding_side=padding_side,
            truncation_side=truncation_side,
            model_max_length=model_max_length,
        )
        tokenizer._files = files
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if roles := {name: value for name, value in roles.items() if value is not None}:
            tokenizer.add_special_tokens(roles)
        return tokenizer

    def __repr__(self) -> str:
        name, _ = self.backend.file
        return f"{type(self).__name__}({name}, {len(self)} tokens, eos_token={self.eos_token!r})"

    @property
    def add_bos_token(self) -> bool:
        """Whether `add_special_tokens=True` puts the bos token first."""
        return self.bos_token_id is not None and self._single[0] == self.bos_token_id

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Returns the number of special tokens around a text or a pair."""
        return batching.overhead(self._pair if pair else self._single)

    @overload
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        *,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: None = None,
        **unsupported: Any,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        *,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str,
        **unsupported: Any,
    ) -> Any: ...
    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        *,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **unsupported: Any,
    ) -> Any:
        """Returns the ids of a text; special tokens within the text are always recognised.

        It takes the arguments of a call of the tokenizer that concern one text. With `return_tensors` the ids
        are an array [1, T].
        """
        if (
            text_pair is None and not truncation and not unsupported and return_tensors is None
        ):  # without the work for offsets
            ids = self._encode(text, self.backend.encode)
            if not add_special_tokens:
                return ids
            before = self._single.index("A")
            return [*self._single[:before], *ids, *self._single[before + 1 :]]
        supported = ("padding", "pad_to_multiple_of", "padding_side", "split_special_tokens")
        options = {name: unsupported.pop(name) for name in supported if name in unsupported}
        refuse(
            "encode",
            unsupported,
            ENCODE,
            ("text_pair", "truncation", "max_length", "return_tensors", *supported),
        )
        batch = self(
            self._one_text(text),
            text_pair,
            add_special_tokens=add_special_tokens,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **{"padding": False} | options,
        )
        return batch.input_ids[0].tolist() if return_tensors is None else batch.input_ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text without the special tokens around it; all cores take part.

        Raises:
            UserError, TypeError: a text cannot be encoded, as in `encode`.
        """
        try:
            return self.backend.encode_batch(texts)
        except (UserError, TypeError, RuntimeError):  # of one text, which `_encode` names
            return [self._encode(text, self.backend.encode) for text in texts]

    def surround(
        self, ids: list[int], pair_ids: list[int] | None = None, *, max_length: int | None = None
    ) -> list[int]:
        """Puts the special tokens of the files around the ids of a text or a pair.

        With `max_length` the ids are cut as `truncation=True` cuts them. The result may be `ids` itself.

        Raises:
            UserError: `max_length` is too short for the special tokens.
        """
        layout = self._single if pair_ids is None else self._pair
        room = None if max_length is None else max_length - batching.overhead(layout)
        first, second = ids, pair_ids or []
        if room is not None and len(first) + len(second) > room:
            pieces, pair_pieces = Pieces(first, [], []), Pieces(second, [], [])
            pieces, pair_pieces = batching.truncate(
                pieces, pair_pieces, "longest_first", room, self.truncation_side
            )
            first, second = pieces.ids, pair_pieces.ids
        if layout == ("A",):
            return first
        parts = {"A": first, "B": second}
        return [i for part in layout for i in (parts[part] if isinstance(part, str) else (part,))]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False) -> list[str]:
        """Returns the tokens of a text."""
        ids = self.encode(text, pair, add_special_tokens)
        return [token for token in self.convert_ids_to_tokens(ids) if token is not None]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Returns the text of tokens."""
        assembler = self.backend.assembler()
        return "".join([assembler.put(token) for token in tokens]) + assembler.end()

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **unsupported: Any) -> str:
        """Returns the text of an id or a row of ids (list, NumPy or JAX array); unknown ids have no text.

        Raises:
            TypeError: a value is not an integer. UserError: an id is negative, or there are several rows.
        """
        refuse("decode", unsupported, DECODE, ("skip_special_tokens",))
        skipped = self.backend.special_ids if skip_special_tokens else frozenset()
        return self.backend.decode([i for i in as_ids(token_ids) if i not in skipped])

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False, **unsupported: Any
    ) -> list[str]:
        """Returns the text of every row."""
        return [self.decode(row, skip_special_tokens, **unsupported) for row in sequences]

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Returns a decoder that takes ids as they are generated."""
        return IncrementalDecoder(self, skip_special_tokens)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        padding: bool | str = True,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        split_special_tokens: bool = False,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Returns the ids of one text or several as int32 arrays [B, T]; a single text is a batch of one.

        Args:
            text: a text or several; with `is_split_into_words`, a list of words or several.
            text_pair: second texts, one for each text.
            padding: True or "longest", "max_length", or False ("do_not_pad": all rows must be equally long).
            truncation: True or "longest_first", "only_first", "only_second"; without it a text that is longer
                than `max_length` stays whole.
            max_length: the length with special tokens; default, where it is needed: `model_max_length`.
            pad_to_multiple_of: rounds the length up.
            padding_side: in place of the tokenizer's.
            add_special_tokens: whether the special tokens of the files go around each text.
            is_split_into_words: texts are lists of words; `word_ids` of the result has each token's word.
            split_special_tokens: special tokens within the texts are text like any other, so that texts by
                strangers cannot contain them.
            return_tensors: "np" (default) or "jax".
            return_attention_mask: False leaves it out.
            return_special_tokens_mask: adds 1 for special tokens around the texts and for padding, else 0.
            return_offsets_mapping: adds the start and stop of each token in its text or word,
                `offset_mapping` [B, T, 2].
            return_length: adds `length` [B], padding included.

        Raises:
            UserError: there are no texts, unequal rows without padding, no length to cut or pad to, or no pad
                token; an argument of transformers is not supported.
        """
        refuse("a tokenizer", unsupported, CALL, _CALL_ARGUMENTS)
        texts = batching.as_texts(text, "text", is_split_into_words)
        seconds = (
            None if text_pair is None else batching.as_texts(text_pair, "text_pair", is_split_into_words)
        )
        if seconds is not None and len(seconds) != len(texts):
            raise UserError(
                f"text has {len(texts)} entries and text_pair {len(seconds)}; expected one for each"
            )
        cut = batching.choice("truncation", truncation, batching.TRUNCATIONS)
        pad = batching.choice("padding", padding, batching.PADDINGS)
        as_tensor = _tensors(return_tensors)
        if cut is not None or pad == "max_length":
            max_length = self._limit(max_length)
        layout: SpecialTokenLayout = self._single if seconds is None else self._pair
        if not add_special_tokens:
            layout = ("A",) if seconds is None else ("A", "B")
        nothing = Pieces([], [], [])
        pieces = partial(self.backend.pieces, split_special=split_special_tokens)
        rows = []
        for index, first_text in enumerate(texts):
            first = self._encode(first_text, pieces, is_split_into_words)
            second = nothing
            if seconds is not None:
                second = self._encode(seconds[index], pieces, is_split_into_words)
            if cut is not None and max_length is not None:
                room = max_length - batching.overhead(layout)
                first, second = batching.truncate(first, second, cut, room, self.truncation_side)
            rows.append(batching.arrange(layout, first, second))
        lengths = [len(row.ids) for row in rows]
        width = batching.width(lengths, pad, max_length, pad_to_multiple_of)
        side = padding_side or self.padding_side
        fill = 0 if min(lengths) == width else self._padding_id()
        columns: dict[str, tuple[list[Any], Any]] = {
            "input_ids": ([row.ids for row in rows], fill),
            "attention_mask": ([[1] * length for length in lengths], 0),
            "special_tokens_mask": ([[int(each is None) for each in row.sequences] for row in rows], 1),
            "offset_mapping": ([row.offsets for row in rows], (0, 0)),
        }
        left_out = {
            "attention_mask": return_attention_mask is False,
            "special_tokens_mask": not return_special_tokens_mask,
            "offset_mapping": not return_offsets_mapping,
        }
        arrays = {
            name: batching.pad_rows(values, width, empty, side)
            for name, (values, empty) in columns.items()
            if not left_out.get(name)
        }
        if return_length:
            arrays["length"] = np.full(len(rows), width, np.int32)
        return BatchEncoding.of(arrays, rows, side, self.backend.id_to_token, as_tensor)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Pads rows of ids to one length, as a collator does: a dict of rows, or a list of dicts of one each.

        `attention_mask` and `token_type_ids` are padded with 0, `special_tokens_mask` with 1. Other entries
        must have rows of one length already.

        Raises:
            UserError: there are no `input_ids`, or rows of another entry are not equally long.
        """
        refuse("pad", unsupported, PAD, ("padding", "max_length", "pad_to_multiple_of", "padding_side"))
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = batching.from_examples(encoded_inputs)
        pad = batching.choice("padding", padding, batching.PADDINGS)
        rows = batching.rows_of(encoded_inputs)
        if return_attention_mask is not False:
            rows.setdefault("attention_mask", [[1] * len(row) for row in rows["input_ids"]])
        lengths = [len(row) for row in rows["input_ids"]]
        if pad == "max_length":
            max_length = self._limit(max_length)
        width = batching.width(lengths, pad, max_length, pad_to_multiple_of)
        fills = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
        fills["input_ids"] = 0 if min(lengths) == width else self._padding_id()
        side = padding_side or self.padding_side
        arrays = {
            name: batching.pad_rows(values, width, fills[name], side)
            if name in fills
            else batching.equal_rows(name, values)
            for name, values in rows.items()
        }
        return BatchEncoding.of(arrays, [], side, self.backend.id_to_token, _tensors(return_tensors))

    @overload
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: Literal[True] = True,
        *,
        return_tensors: None = None,
        return_dict: Literal[False] = False,
        **options: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        *,
        tokenize: Literal[False],
        **options: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        **options: Any,
    ) -> Any: ...
    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """Returns the ids of a conversation, or its text; special tokens come from the template only.

        A list of conversations gives a list. The template runs in a process of its own, which is limited to
        10 seconds, 1 GiB of memory and 16 million characters (more if the messages are longer).

        Args:
            conversation: dicts with `role` and, mostly, `content`, in order; or a list of such conversations.
            tools: schemas (dict), or functions, whose type hints and docstring make the schema.
            documents: dicts with `title` and `text`, for templates that have a place for them.
            chat_template: a template, or the name of one of the tokenizer's; default: the tokenizer's own.
            add_generation_prompt: ends the text with the beginning of an answer.
            continue_final_message: ends the text within the final message, so that the model continues it;
                the name of a field in place of True continues that.
            tokenize: False returns the text, and the arguments that follow have no effect.
            padding, truncation, max_length: as in a call of the tokenizer.
            return_tensors: "np" or "jax" returns an array [B, T].
            return_dict: returns a `BatchEncoding`, with `attention_mask`.
            return_assistant_tokens_mask: adds `assistant_masks`: 1 for the tokens that the template writes
                between `{% generation %}` and `{% endgeneration %}`. It needs `return_dict`.
            tokenizer_kwargs: other arguments of a call of the tokenizer.
            template_variables: other variables of the template; plain data.

        Raises:
            UserError: there is no conversation or no template, or the template failed (with its own message)
                or exceeded a limit.
            TypeError: a variable that the template lacks is nearly an argument's name.
        """
        refused = {name: template_variables.pop(name) for name in CHAT if name in template_variables}
        refuse("apply_chat_template", refused, CHAT, ())
        template = _chat.choose_template(chat_template, self.chat_template, tools)
        _chat.check_variables(template_variables, template, _CHAT_ARGUMENTS)
        if return_assistant_tokens_mask:
            _chat.check_generation_mask(template, return_dict and tokenize, continue_final_message)
        several = _chat.is_batch(conversation)
        rendered = [
            _chat.render(
                template,
                each,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**self.special_tokens_map, **template_variables},
            )
            for each in (conversation if several else [conversation])
        ]
        texts = [each.text for each in rendered]
        if not tokenize:
            return texts if several else texts[0]
        options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options |= {"add_special_tokens": False, **(tokenizer_kwargs or {})}
        if not (return_dict or return_tensors):
            rows = [self.encode(text, **options) for text in texts]
            if several and padding is not False:
                rows = self.pad(
                    {"input_ids": rows}, padding=padding, max_length=max_length
                ).input_ids.tolist()
            return rows if several else rows[0]
        batch = self(texts, return_tensors=return_tensors, **options)
        if return_assistant_tokens_mask:
            batch.mark("assistant_masks", [each.spans for each in rendered])
        return batch if return_dict else batch.input_ids

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
        changed |= {key: self._config[key] for key in self._changed}
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
        _files.write_files(directory, files)
        return tuple(str(target_in(directory, name)) for name in files)

    def _config_to_write(self) -> dict[str, Any]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        if _files.TEMPLATE in self._files:
            del config["chat_template"]
        return config

    def _setting(self, key: str) -> Any:
        value = self._config.get(key)
        return _SETTINGS[key] if value is None else value

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

    @staticmethod
    def _one_text(text: Any) -> str:
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), got {type(text).__name__} {text!r:.40}")
        return text

    def _encode(self, text: Any, encode: Callable[[Any], _Ids], words: bool = False) -> _Ids:
        """Returns what the back end makes of a text, or of a list of words."""
        if not words:
            self._one_text(text)
        try:
            return encode(text)
        except (TypeError, RuntimeError) as error:
            text = " ".join(text) if words else text
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


def _tensors(name: str | None) -> Callable[[np.ndarray], Any] | None:
    """Returns the function that makes the user's kind of array, None for NumPy's."""
    if name in (None, "np"):
        return None
    if name == "jax":
        import jax.numpy as jnp  # only for those who have it in use

        return jnp.asarray
    raise UserError(
        f"return_tensors={name!r} is not supported; use 'np' or 'jax' (torch.from_numpy takes arrays)"
    )


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a method's arguments."""
    named = inspect.signature(function).parameters.values()
    return tuple(each.name for each in named if each.kind != each.VAR_KEYWORD and each.name != "self")


_LOAD_ARGUMENTS = _arguments(Phi3Tokenizer.from_pretrained)
_CALL_ARGUMENTS = _arguments(Phi3Tokenizer.__call__)
_CHAT_ARGUMENTS = _arguments(Phi3Tokenizer.apply_chat_template)
