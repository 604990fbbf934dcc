"""The base of all model classes: loading, saving, resizing the vocabulary, making a cache."""

from os import PathLike
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model.kernels.dispatch import IMPLEMENTATIONS
from phi3_jax.model.layers import Embedding, Linear, QuantizedParam, check_layer, normal
from phi3_jax.model.loading import load_model
from phi3_jax.model.saving import save_model
from phi3_jax.native.attention import can_attend
from phi3_jax.parallel.sharding import check_divides, place
from phi3_jax.sizes import round_up


class Phi3PreTrainedModel(nnx.Module):
    """Base of `Phi3Model` and of the heads on it."""

    config: Phi3Config
    config_class: ClassVar[type[Phi3Config]] = Phi3Config

    @classmethod
    def for_config(cls, config: Phi3Config) -> type[Self]:
        """Returns the class for this family that has the same head.

        Raises:
            UserError: there is none.
        """
        if isinstance(config, cls.config_class) and config.model_type == cls.config_class.model_type:
            return cls
        for family in cls.__subclasses__():
            if family.config_class.model_type == config.model_type:
                return family
        families = (base for base in cls.__mro__ if issubclass(base, Phi3PreTrainedModel))
        fitting = (base.__name__ for base in families if base.config_class.model_type == config.model_type)
        name = next(fitting, None)
        raise UserError(
            f"{cls.__name__} takes a {cls.config_class.__name__}, whose model_type is "
            f"{cls.config_class.model_type!r}, and this one is a {type(config).__name__} "
            f"with {config.model_type!r}" + (f"; use {name}" if name else "")
        )

    @classmethod
    def check_config(cls, config: Phi3Config) -> None:
        """Raises a UserError if the config is another family's."""
        family = cls.for_config(config)
        if family is not cls:
            raise UserError(f"{cls.__name__} does not take a {type(config).__name__}; use {family.__name__}")

    @property
    def decoder(self) -> Any:
        """Returns the `Phi3Model`, which is the model itself or the model under its head."""
        raise NotImplementedError

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of parameters and activations."""
        return self.decoder.norm.weight.dtype

    @property
    def on_cpu(self) -> bool:
        """Whether the parameters are on CPUs, or would be for an abstract model; False while it is traced."""
        weight = self.decoder.norm.weight.get_value()
        if isinstance(weight, jax.core.Tracer):
            return False
        if isinstance(weight, jax.ShapeDtypeStruct):
            mesh = self.decoder.mesh
            return (jax.devices() if mesh is None else mesh.devices.flat)[0].platform == "cpu"
        return {device.platform for device in weight.devices()} == {"cpu"}

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype with which a cache of this model is fastest: float32 for XLA on CPU, else the model's.

        On CPU, XLA of jaxlib 0.10 has no 16-bit updates: it would widen and copy the whole cache at every
        step. The C++ library writes and reads bfloat16.
        """
        takes_bfloat16 = self.dtype == jnp.bfloat16 and can_attend(self.config.head_dim)
        return jnp.dtype(jnp.float32) if self.on_cpu and not takes_bfloat16 else self.dtype

    def num_parameters(self) -> int:
        """Returns the number of elements in all parameters; a quantized weight has those of the original."""
        variables = jax.tree.leaves(self, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return sum(variable.get_value().size for variable in variables)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = None, sliding: bool = False, chunk: int = 512
    ) -> KVCache:
        """Returns an empty cache of `max_length` slots a row.

        Args:
            batch_size: rows.
            max_length: the most tokens of a row, padding included.
            dtype: default: the model's; see `cache_dtype` for the fastest. "int8" stores each vector as int8
                with a scale, half of bfloat16's bytes (`QuantizedVectors`).
            sliding: store only what the sliding window can see, in a ring, if that is less than `max_length`.
            chunk: the most tokens that such a ring takes at once.

        Raises:
            UserError: `sliding` for a model without a sliding window, or a number below 1.
        """
        window = None
        if sliding:
            if self.config.sliding_window is None:
                raise UserError("sliding=True needs a sliding_window in the config, and it has none")
            if chunk < 1:
                raise UserError(f"chunk={chunk}: a ring must take at least one token at once")
            ring = round_up(self.config.sliding_window - 1 + chunk, 128)
            if ring < max_length:
                max_length, window = ring, self.config.sliding_window
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        return KVCache.create(self.config, batch_size, max_length, dtype, window, self.decoder.mesh)

    def set_attn_implementation(self, implementation: str | None) -> None:
        """Sets the attention kernel; by default the platform decides.

        Args:
            implementation: "xla", "pallas" (splash attention, and a kernel for caches; interpreted without a
                TPU), "cudnn" (NVIDIA GPUs), or None: Pallas on TPU, cuDNN on GPU, XLA elsewhere.

        Raises:
            UserError: another name.
        """
        if implementation not in IMPLEMENTATIONS:
            known = ", ".join(map(repr, IMPLEMENTATIONS))
            raise UserError(f"attn_implementation={implementation!r} is not known; use one of {known}")
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "attn_implementation"):
                module.attn_implementation = implementation

    def get_input_embeddings(self) -> Embedding:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: Embedding) -> None:
        """Replaces the token embeddings; where they are tied, the output layer as well.

        Raises:
            UserError: `value` is no `Embedding`, or its weight has another shape.
        """
        check_layer("embeddings", value, self.decoder.embed_tokens)
        self.decoder.embed_tokens = value

    def get_output_embeddings(self) -> Embedding | Linear | None:
        """Returns the output layer over the vocabulary, whose weight is [V, D]; None without one."""
        return None

    def gradient_checkpointing_enable(self, policy: Any = None) -> None:
        """Makes the backward pass compute each layer again instead of keeping its activations.

        `policy`, one of `jax.checkpoint_policies`, says what is kept all the same; default: nothing.
        """
        self.decoder.remat_policy = policy or jax.checkpoint_policies.nothing_saveable

    def gradient_checkpointing_disable(self) -> None:
        """Makes the forward keep activations for the backward pass."""
        self.decoder.remat_policy = None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *,
        mean_resizing: bool = True,
        rngs: nnx.Rngs | int = 0,
    ) -> Embedding:
        """Shortens or extends the vocabulary, the output layer and `config.vocab_size`.

        Args:
            new_num_tokens: the new number of rows; default: as many as before.
            pad_to_multiple_of: rounds the rows up.
            mean_resizing: new rows are the mean of the old ones, so that new tokens change the others'
                probabilities little (transformers adds a draw with the covariance of the old ones);
                otherwise they are drawn from normal(0, initializer_range).
            rngs: for drawn rows.

        Raises:
            UserError: the embeddings are quantized, no row would remain, or not those of the config's pad,
                bos and eos tokens, or the mesh does not divide the rows.
        """
        if new_num_tokens is None:
            new_num_tokens = self.config.vocab_size
        if pad_to_multiple_of is not None:
            if pad_to_multiple_of < 1:
                raise UserError(f"pad_to_multiple_of={pad_to_multiple_of} must be positive")
            new_num_tokens = round_up(new_num_tokens, pad_to_multiple_of)
        config = self.config.replace(vocab_size=new_num_tokens)  # checks the number and the special tokens
        mesh = self.decoder.mesh
        check_divides(mesh, config.divided_sizes)
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs

        def resize(weight: Array) -> Array:
            extra = new_num_tokens - weight.shape[0]
            if extra <= 0:
                return weight[:new_num_tokens]
            shape = (extra, weight.shape[1])
            if mean_resizing:
                rows = jnp.broadcast_to(jnp.mean(weight.astype(jnp.float32), axis=0), shape)
            else:
                rows = normal(rngs.params(), shape, config.initializer_range, weight.dtype)
            return jnp.concatenate([weight, rows.astype(weight.dtype)])

        parameters = [each for each in self._vocabulary_weights() if isinstance(each, nnx.Param)]
        if len(parameters) < len(self._vocabulary_weights()):
            raise UserError("the token embeddings are quantized; resize the original model's, then quantize")
        for parameter in parameters:
            parameter.set_value(place(resize(parameter[...]), mesh, parameter.axes))
        self.decoder.config = config
        return self.get_input_embeddings()

    def _vocabulary_weights(self) -> list[nnx.Param | QuantizedParam]:
        """Returns the parameters with a row for every token."""
        return [self.decoder.embed_tokens.weight]

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **options: Any) -> Self:
        """Loads a checkpoint: a directory in Hugging Face's layout, a GGUF file or a name on the Hub.

        See `phi3_jax.model.loading.load_model` for the options (`dtype`, `config`, `revision`, `token`, ...).
        """
        return load_model(cls, name_or_path, **options)

    def save_pretrained(self, directory: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Writes `config.json` and safetensors for transformers too; see `saving.save_model`."""
        save_model(self, directory, max_shard_size=max_shard_size)
