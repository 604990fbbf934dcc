"""`Phi3SmallConfig`: the contents of a Phi-3-small's `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.config.model_checks import RULES, Rules, is_size
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import attention_by_growth, is_number, is_positive
from phi3_jax.errors import UserError
from phi3_jax.sizes import round_up

SPELLING = {
    "ff_intermediate_size": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "embedding_dropout_prob": "embd_pdrop",
    "ffn_dropout_prob": "resid_pdrop",
    "attention_dropout_prob": "attention_dropout",
    "rope_embedding_base": "rope_theta",
}
"""Names of Phi-3-small, and the fields of `Phi3Config` that mean the same."""

_UNWRITTEN = ("head_dim", "hidden_dropout", "partial_rotary_factor", "sliding_window")
"""Fields that a Phi-3-small's `config.json` does not have."""

_ORIGINAL = 8192
"""The tokens of the window before it was extended."""

_DUMMY_TOKENS = (100256, *range(100258, 100261), 100264, 100265, *range(100267, 100352))
"""Ids of cl100k's vocabulary that stand for no token."""

_SIZE = ("a positive integer below 2**31", is_size)
_FLAG = ("true or false", lambda v: type(v) is bool)


@dataclass(frozen=True)
class Phi3SmallConfig(Phi3Config):
    """A Phi-3-small's sizes and settings.

    Settings that Phi-3 has as well have Phi-3's names, and the other names of `SPELLING` can be read.
    `from_dict` and `to_dict` use the spelling of its `config.json`.
    """

    model_type: ClassVar[str] = "phi3small"
    rope_defaults: ClassVar[Mapping[str, Any]] = {
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": _ORIGINAL,
    }
    projections: ClassVar[Mapping[str, str]] = {
        "qkv_proj": "self_attn.query_key_value",
        "o_proj": "self_attn.dense",
        "gate_up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
    }
    has_biases: ClassVar[bool] = True
    rules: ClassVar[Rules] = {
        **RULES,
        "hidden_act": ("'gegelu', the only one", lambda v: v == "gegelu"),
        "gegelu_limit": ("a positive number, or None for no limit", lambda v: v is None or is_positive(v)),
        **dict.fromkeys(("mup_use_scaling", "blocksparse_homo_head_pattern"), _FLAG),
        **dict.fromkeys(("mup_attn_multiplier", "rope_position_scale"), ("a positive number", is_positive)),
        "mup_embedding_multiplier": (
            "a number, or None; without effect unless it is positive",
            lambda v: v is None or is_number(v),
        ),
        "mup_width_multiplier": (
            "a positive number, or None or 0 for no division",
            lambda v: v is None or (is_number(v) and (v == 0 or is_positive(v))),
        ),
        **dict.fromkeys(("blocksparse_block_size", "blocksparse_triton_kernel_block_size"), _SIZE),
        **dict.fromkeys(("blocksparse_num_local_blocks", "blocksparse_vert_stride"), _SIZE),
        "dense_attention_every_n_layers": (
            "a positive integer, or None for no dense layer",
            lambda v: v is None or is_size(v),
        ),
        "sliding_window": ("None: the model has no window", lambda v: v is None),
        "partial_rotary_factor": ("1: all dims rotate", lambda v: v == 1),
    }

    vocab_size: int = 100352
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    resid_pdrop: float = 0.1
    """Dropout after the MLP; there is none after attention."""
    embd_pdrop: float = 0.1
    hidden_act: str = "gegelu"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 100257
    eos_token_id: int | tuple[int, ...] | None = 100257
    pad_token_id: int | None = None
    gegelu_limit: float | None = 20.0
    mup_use_scaling: bool = True
    """Whether scores are divided by head_dim, not by its root."""
    mup_attn_multiplier: float = 1.0
    """Factor on the scores where `mup_use_scaling`."""
    mup_embedding_multiplier: float | None = 10.0
    """Factor on the embeddings, after their dropout."""
    mup_width_multiplier: float | None = 8.0
    """Divisor of the logits."""
    blocksparse_block_size: int = 64
    blocksparse_num_local_blocks: int = 16
    blocksparse_vert_stride: int = 8
    blocksparse_homo_head_pattern: bool = False
    blocksparse_triton_kernel_block_size: int = 64
    """A size of Microsoft's kernel, which must divide a block; nothing here depends on it."""
    dense_attention_every_n_layers: int | None = 2
    """Layers n, 2n, 3n, ... see all keys; None: no layer does."""
    rope_position_scale: float = 1.0
    """Factor on the positions of plain rope; other ropes ignore it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        block, kernel = self.blocksparse_block_size, self.blocksparse_triton_kernel_block_size
        if block % kernel:
            raise UserError(
                f"blocksparse_triton_kernel_block_size={kernel} does not divide "
                f"blocksparse_block_size={block}; use a divisor, such as {block}"
            )
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"head_dim={self.head_dim} is not hidden_size={self.hidden_size} divided by "
                f"num_attention_heads={self.num_attention_heads}; Phi-3-small has no other head_dim"
            )

    def __getattr__(self, name: str) -> Any:
        if name in SPELLING:
            return getattr(self, SPELLING[name])
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def _gather_rope(self) -> None:
        sizes = self.original_max_position_embeddings, self.max_position_embeddings
        for name in ("rope_scaling", "rope_parameters"):
            self._set(**{name: _own_longrope(getattr(self, name), *sizes)})
        super()._gather_rope()

    @property
    def block_pattern(self) -> BlockPattern:
        return BlockPattern(
            size=self.blocksparse_block_size,
            local=self.blocksparse_num_local_blocks,
            stride=self.blocksparse_vert_stride,
            heads=self.num_attention_heads,
            same_for_all_heads=self.blocksparse_homo_head_pattern,
        )

    @property
    def dummy_token_ids(self) -> tuple[int, ...]:
        return tuple(token for token in _DUMMY_TOKENS if token < self.vocab_size)

    @property
    def attention_scale(self) -> float:
        return self.mup_attn_multiplier / self.head_dim if self.mup_use_scaling else super().attention_scale

    @property
    def embedding_multiplier(self) -> float:
        factor = self.mup_embedding_multiplier
        return factor if factor is not None and factor > 0 else 1.0

    @property
    def position_scale(self) -> float:
        return self.rope_position_scale if self.rope_scaling.rope_type == "default" else 1.0

    def is_sparse(self, layer: int) -> bool:
        every = self.dense_attention_every_n_layers
        return every is None or (layer + 1) % every != 0

    def replace(self, **changes: Any) -> "Phi3Config":
        """Returns a copy with these fields changed, under either of their names, and checks it."""
        return super().replace(**_by_field(changes))

    @classmethod
    def _from_spelling(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        values = dict(mapping)
        multiplier, pads = values.pop("ff_dim_multiplier", None), values.pop("gegelu_pad_to_256", True)
        hidden, size = values.get("hidden_size", cls.hidden_size), values.get("ff_intermediate_size")
        has_size = size is not None or ("ff_intermediate_size" not in values and multiplier is None)
        if has_size == (multiplier is not None):
            raise UserError(
                f"ff_intermediate_size={size!r:.80} and ff_dim_multiplier={multiplier!r:.80}: give exactly "
                "one of them, and null for the other"
            )
        if multiplier is not None:
            if not is_positive(multiplier) or not is_size(hidden):
                raise UserError(f"ff_dim_multiplier={multiplier!r:.80} must be a positive number")
            size = int(multiplier * (hidden // 3) * 2)
            values["ff_intermediate_size"] = round_up(size, 256) if pads else size
        values.pop("auto_map", None)  # it names files of code, which are not saved with a model
        return _by_field(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of a Phi-3-small's `config.json`."""
        values = super().to_dict()
        original = values.pop("original_max_position_embeddings")
        for name in _UNWRITTEN:
            values.pop(name, None)
        if self.rope_scaling.has_two_lists:
            values["original_max_position_embeddings"] = original
            values["rope_scaling"]["original_max_position_embeddings"] = original
        for own, name in SPELLING.items():
            values[own] = values.pop(name)
        return values | {"ff_dim_multiplier": None, "model_type": self.model_type}


def _by_field(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings under the names of the fields.

    Raises:
        UserError: a setting has two names and two values.
    """
    for own, name in SPELLING.items():
        if own in values and name in values and values[own] != values[name]:
            raise UserError(
                f"{own}={values[own]!r:.80} contradicts {name}={values[name]!r:.80}; give one of them"
            )
    return {SPELLING.get(name, name): value for name, value in values.items()}


def _own_longrope(entry: Any, original: int | None, longest: int) -> Any:
    """Returns a rope entry of LongRoPE as this family's; any other one as it is.

    A mapping has the rule of Phi-3-small's remote code. A `RopeScaling` has Phi-3's, whose attention factors
    it keeps; so does an `attention_factor`.

    Raises:
        UserError: it has keys that this rope does not know.
    """
    is_scaling = isinstance(entry, RopeScaling)
    if not is_scaling and not isinstance(entry, Mapping):
        return entry
    values: dict[str, Any] = dict(entry.parameters if is_scaling else entry)
    names = [entry.rope_type] if is_scaling else [values.pop(key, None) for key in ("type", "rope_type")]
    if not any(names) or any(name not in ("longrope", "su", None) for name in names):
        return entry
    original = values.get("original_max_position_embeddings") or original or _ORIGINAL
    growth = values.pop("factor", None) or longest / original if is_scaling else None
    factor = values.pop("attention_factor", None)
    for key in ("short_mscale", "long_mscale"):
        given = (
            factor or values.get(key) or (None if growth is None else attention_by_growth(growth, original))
        )
        values |= {} if given is None else {key: given}
    own = {key: value for key, value in values.items() if key not in Phi3SmallConfig.rope_defaults}
    RopeScaling.from_dict({**own, "rope_type": "phi3small"}, strict=True)
    return {**values, "rope_type": "phi3small"}
