"""The vocabulary of a tokenizer: tokens and ids, tokens with a role, added tokens."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from tokenizers import AddedToken

from phi3_jax.errors import UserError

from . import _files
from ._backends import Backend
from ._stream import as_ids

logger = logging.getLogger(__name__)

EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")


def _role(name: str) -> Any:
    """Returns the property of the token with a role, such as `pad_token`."""

    def get(self: "Vocabulary") -> str | None:
        return self._named.get(name)

    def set(self: "Vocabulary", token: str | AddedToken | None) -> None:
        self._name_token(name, token)

    return property(get, set)


def _role_id(name: str) -> Any:
    """Returns the property of the id of the token with a role."""

    def get(self: "Vocabulary") -> int | None:
        token = self._named.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def set(self: "Vocabulary", token_id: int | None) -> None:
        token = None if token_id is None else self.backend.id_to_token(as_ids(token_id)[0])
        if token is None and token_id is not None:
            raise UserError(f"{name}_id={token_id} has no token; the vocabulary has {len(self)} tokens")
        self._name_token(name, token)

    return property(get, set)


class Vocabulary:
    """Tokens and ids under transformers' names; the base of `Phi3Tokenizer`.

    Tokens with a role (`pad_token`, `pad_token_id` and the like) may be set to tokens of the vocabulary.
    """

    backend: Backend

    def __init__(self, backend: Backend, config: Mapping[str, Any]) -> None:
        self.backend = backend
        self._config = dict(config)
        self._changed: set[str] = set()
        """The config's fields that differ from its file."""
        backend.add_tokens(_files.added_tokens(self._config))
        self._named = self._name_tokens()

    bos_token = _role("bos_token")
    eos_token = _role("eos_token")
    unk_token = _role("unk_token")
    sep_token = _role("sep_token")
    pad_token = _role("pad_token")
    cls_token = _role("cls_token")
    mask_token = _role("mask_token")
    bos_token_id = _role_id("bos_token")
    eos_token_id = _role_id("eos_token")
    unk_token_id = _role_id("unk_token")
    sep_token_id = _role_id("sep_token")
    pad_token_id = _role_id("pad_token")
    cls_token_id = _role_id("cls_token")
    mask_token_id = _role_id("mask_token")

    def __len__(self) -> int:
        """Returns the number of tokens with the added ones; the embedding may have more rows."""
        return len(self.backend)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones, as in transformers; `len(tokenizer)` counts all."""
        return self.backend.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of every token, added ones included."""
        return self.backend.vocabulary()

    def get_added_vocab(self) -> dict[str, int]:
        """Returns the id of every added token."""
        return {token.content: i for i, token in sorted(self.backend.added_tokens.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id, with their flags."""
        return dict(sorted(self.backend.added_tokens.items()))

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a role."""
        return {role: self._named[role] for role in _files.NAMED_TOKENS if role in self._named}

    @property
    def extra_special_tokens(self) -> list[str]:
        """The special tokens of the config without a role."""
        return list(dict.fromkeys(_files.extra_special_tokens(self._config)))

    additional_special_tokens = extra_special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that the config gives a role, as in transformers.

        `decode(skip_special_tokens=True)` drops more: every token flagged special, `<|user|>` among them.
        """
        tokens = dict.fromkeys((*self.special_tokens_map.values(), *self.extra_special_tokens))
        return [token for token in tokens if self.backend.token_to_id(token) is not None]

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        ids = map(self.backend.token_to_id, self.all_special_tokens)
        return list(dict.fromkeys(i for i in ids if i is not None))

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Adds tokens after all others, or makes pieces of the vocabulary whole tokens; returns how many.

        The model needs a row for each (`resize_token_embeddings(len(tokenizer))`). They are
        saved with the tokenizer.

        Args:
            new_tokens: one or several; `tokenizers.AddedToken` has flags.
            special_tokens: whether `decode(skip_special_tokens=True)` drops them.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        for token in tokens:
            if not isinstance(token, str | AddedToken):
                raise TypeError(
                    f"new tokens must be str or AddedToken, got {type(token).__name__} {token!r:.40}"
                )
        added = [_as_added(token, special_tokens) for token in tokens]
        if not added:
            return 0
        number = self.backend.extend(added)
        decoder = dict(self._config.get("added_tokens_decoder") or {})
        contents = {token.content for token in added}
        for token_id, token in self.backend.added_tokens.items():
            if token.content in contents:
                decoder[str(token_id)] = _files.token_entry(token)
        self._set_config("added_tokens_decoder", decoder)
        return number

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Adds tokens and gives them roles, as `{"pad_token": "<pad>"}`; returns how many are new.

        Args:
            special_tokens_dict: a token for each role; under `extra_special_tokens` (or
                `additional_special_tokens`) a list of special tokens without one.
            replace_extra_special_tokens: the list replaces the present one; those stay added tokens.

        Raises:
            UserError: there is no such role.
        """
        roles = dict(special_tokens_dict)
        extra = next((roles.pop(name) for name in EXTRA_TOKENS if name in roles), None)
        if unknown := sorted(roles.keys() - set(_files.NAMED_TOKENS)):
            known = ", ".join((*_files.NAMED_TOKENS, EXTRA_TOKENS[0]))
            raise UserError(f"no special token is called {unknown[0]!r}; use {known}")
        if isinstance(extra, str | AddedToken):
            raise UserError(f"{EXTRA_TOKENS[0]} must be a list of tokens, got {extra!r}")
        added = self.add_tokens([*roles.values(), *(extra or [])], special_tokens=True)
        for role, token in roles.items():
            self._name_token(role, token)
        if extra:
            present = [] if replace_extra_special_tokens else self.extra_special_tokens
            texts = [str(getattr(token, "content", token)) for token in extra]
            self._config.pop("additional_special_tokens", None)
            self._set_config("extra_special_tokens", list(dict.fromkeys([*present, *texts])))
        return added

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
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False
    ) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: Any, skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Returns the token of an id, or of each; None for an id without one.

        `skip_special_tokens` leaves out those of a list that are in `all_special_ids`, as transformers does.
        """
        if not (isinstance(ids, Iterable) and np.ndim(ids)):  # type: ignore[arg-type]
            return self.backend.id_to_token(as_ids(ids)[0])
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend.id_to_token(i) for i in as_ids(ids) if i not in skipped]

    def _name_token(self, role: str, token: str | AddedToken | None) -> None:
        text = None if token is None else str(getattr(token, "content", token))
        if text is None:
            self._named.pop(role, None)
        elif self.backend.token_to_id(text) is None:
            raise UserError(
                f"{role}={text!r} is not in the vocabulary; add it with "
                f"add_special_tokens({{{role!r}: {text!r}}})"
            )
        else:
            self._named[role] = text
        self._set_config(role, text)

    def _set_config(self, key: str, value: Any) -> None:
        self._config[key] = value
        self._changed.add(key)

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


def _as_added(token: str | AddedToken, special: bool) -> AddedToken:
    """Returns the token with the flags that the library `tokenizers` gives a text."""
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    if special and not token.special:
        flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(token.content, special=True, **flags)
    return token
