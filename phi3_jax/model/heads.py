"""The heads on the decoder: causal language model, sequence and token classification."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation.mixin import GenerationMixin
from phi3_jax.model.arguments import batch_shape, check_labels, check_sequence_labels, select_positions
from phi3_jax.model.blocked_loss import (
    BlockedHead,
    Finish,
    Product,
    blocked_cross_entropy_sum,
    needs_blocks,
    no_change,
)
from phi3_jax.model.decoder import Phi3Model
from phi3_jax.model.layers import Embedding, Linear, QuantizedParam, check_layer, dropout, is_alone, matmul
from phi3_jax.model.losses import (
    IGNORE_INDEX,
    cross_entropy,
    cross_entropy_sum,
    sequence_loss_count,
    sequence_loss_sum,
)
from phi3_jax.model.outputs import (
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.parallel.sharding import constrain, gather, shards
from phi3_jax.quantization.product import quantized_product
from phi3_jax.quantization.weight import QuantizedWeight
from phi3_jax.sizes import ceil_div


class _ModelWithHead(Phi3PreTrainedModel):
    """A decoder under the name `model`, as in the checkpoint, and a head on it.

    Arguments and errors are as in `Phi3Model`.
    """

    model: Phi3Model
    decoder_class: ClassVar[type[Phi3Model]] = Phi3Model

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.check_config(config)
        self.model = self.decoder_class(config, rngs=rngs, dtype=dtype, mesh=mesh)
        inputs, std = {"embed": config.hidden_size}, config.initializer_range
        self._add_head(config, partial(Linear, inputs, std=std, rngs=rngs, dtype=jnp.dtype(dtype), mesh=mesh))

    def _add_head(self, config: Phi3Config, linear: Callable[..., Linear]) -> None:
        """Adds the head; `linear` makes a projection of hidden states to named axes."""
        raise NotImplementedError

    @property
    def decoder(self) -> Phi3Model:
        return self.model

    @property
    def config(self) -> Phi3Config:  # type: ignore[override]
        return self.model.config


class Phi3ForCausalLM(_ModelWithHead, GenerationMixin):
    """The decoder with a language-model head, which is tied to the embedding or has its own weight."""

    def _add_head(self, config: Phi3Config, linear: Callable[..., Linear]) -> None:
        self.generation_config = GenerationConfig.from_model(config)
        self.lm_head = None if config.tie_word_embeddings else linear({"vocab": config.vocab_size})

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        *,
        labels: Int[Array, "B T"] | None = None,
        logits_to_keep: int | Int[Array, "*B kept"] = 0,
        num_logits_to_keep: int | None = None,
        num_items_in_batch: Int[Array, ""] | int | None = None,
        **decoder_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits, in float32, of the token after each position.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: the token ids themselves, -100 where nothing is predicted; they are shifted here.
            logits_to_keep: 0: logits at every position; n: at the last n; an array: at those positions,
                [kept] for all rows alike or [B, kept].
            num_logits_to_keep: the older name of `logits_to_keep`.
            num_items_in_batch: divides the summed loss in place of this batch's count of labels.
            decoder_arguments: all other arguments of `Phi3Model`.

        Raises:
            UserError: as `Phi3Model`; labels of another shape or outside the vocabulary, or together with
                `logits_to_keep`; positions that do not exist.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        keep_all = np.ndim(keep) == 0 and keep == 0
        if labels is not None:
            if not keep_all:
                raise UserError("labels need the logits of every position; leave logits_to_keep at 0")
            labels = self._check_labels(labels, batch_shape(input_ids, decoder_arguments))
        last = int(keep) if np.ndim(keep) == 0 and not keep_all else None
        out = self.model(input_ids, attention_mask, hidden_states_to_keep=last, **decoder_arguments)
        x = out.last_hidden_state if np.ndim(keep) == 0 else select_positions(out.last_hidden_state, keep)
        prefill = decoder_arguments.get("past_key_values") is None
        logits = self._logits(x, "length" if prefill and keep_all else None)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        return CausalLMOutputWithPast(logits, loss, out.past_key_values, out.hidden_states, out.attentions)

    def _check_labels(self, labels: Any, shape: tuple[int, int]) -> Array:
        return check_labels(labels, shape, self.config.vocab_size)

    def logits(self, hidden_states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the head to the decoder's `last_hidden_state`; float32."""
        return self._logits(hidden_states, None)

    def _logits(self, x: Float[Array, "B T D"], length_axis: str | None) -> Float[Array, "B T V"]:
        weight, product = self._head()
        logits = self._finish(product(x, weight))
        return constrain(logits, self.model.mesh, "batch", length_axis, "vocab")

    @property
    def _finish(self) -> Finish:
        """What follows the product with the head's weight."""
        return no_change

    def _head(self) -> tuple[Array | QuantizedWeight, Product]:
        """Returns the head's weight, gathered along `fsdp`, and its product with hidden states."""
        weight, mesh = self.get_output_embeddings().weight, self.model.mesh
        if isinstance(weight, QuantizedParam):
            options: Any = {"dtype": jnp.dtype(jnp.float32), "alone": is_alone(mesh)}
            return weight.gathered(mesh), partial(quantized_product, **options)
        return gather(weight[...], mesh, weight.axes), partial(matmul, mesh=mesh)

    def cross_entropy_sum(
        self, hidden_states: Float[Array, "B T D"], labels: Int[Array, "B T"], label_smoothing: float = 0.0
    ) -> Float[Array, ""]:
        """Returns the sum of the cross entropies of all labels that are not -100, which are shifted here.

        If the logits of all positions are too large, blocks of them are computed one after another.

        Args:
            hidden_states: the decoder's `last_hidden_state`, without a cache.
            labels: the token ids themselves, -100 where nothing is predicted.
            label_smoothing: the share of each label that is spread over the vocabulary.
        """
        mesh, vocabulary = self.model.mesh, self.config.vocab_size
        batch, length, _ = hidden_states.shape
        positions = ceil_div(batch, shards(mesh, "batch")) * ceil_div(length, shards(mesh, "length"))
        if not needs_blocks(positions, vocabulary // shards(mesh, "vocab")):
            logits = self._logits(hidden_states, "length")
            return cross_entropy_sum(logits[:, :-1], labels[:, 1:], None, label_smoothing)
        weight, product = self._head()
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
        axes = self.get_output_embeddings().weight.axes
        head = BlockedHead(product, self._finish, axes, vocabulary, label_smoothing, mesh)
        return blocked_cross_entropy_sum(head, hidden_states, weight, labels)

    def get_output_embeddings(self) -> Embedding | Linear:
        """Returns the output layer, whose weight is [V, D]: the embeddings if they are tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replaces the output layer, a `Linear`; where it is tied, the token embeddings, an `Embedding`.

        Raises:
            UserError: the layer is of another class than the present one, or its weight has another shape.
        """
        if self.lm_head is None:
            self.set_input_embeddings(new_embeddings)
        else:
            check_layer("output embeddings", new_embeddings, self.lm_head)
            self.lm_head = new_embeddings

    def _vocabulary_weights(self) -> list[nnx.Param | QuantizedParam]:
        own = [] if self.lm_head is None else [self.lm_head.weight]
        return [*super()._vocabulary_weights(), *own]


class Phi3ForSequenceClassification(_ModelWithHead):
    """The decoder with a linear `score` on each row's last token that is not padding.

    `config.num_labels` and `config.problem_type` say what is predicted.
    """

    def _add_head(self, config: Phi3Config, linear: Callable[..., Linear]) -> None:
        self.score = linear({"labels": config.num_labels})

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        *,
        labels: Num[Array, "..."] | None = None,
        **decoder_arguments: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Returns one row of logits, float32, for each row of tokens.

        They are those of the rightmost token whose id is not `pad_token_id`: ids decide, not the mask. Given
        `inputs_embeds`, they are those of the last position.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: class numbers [B] (-100 does not count), numbers [B] or [B, num_labels] for regression, or
                0s and 1s [B, num_labels] for several classes at once.
            decoder_arguments: all other arguments of `Phi3Model`.

        Raises:
            UserError: as `Phi3Model`; several rows without `pad_token_id`; labels that do not fit.
        """
        config = self.config
        batch, _ = batch_shape(input_ids, decoder_arguments)
        if config.pad_token_id is None and batch != 1:
            raise UserError(
                f"a batch of {batch} rows needs pad_token_id, to find each row's last token; "
                "set it in the config or classify one row at a time"
            )
        if labels is not None:
            labels = check_sequence_labels(labels, config, batch)
        out = self.model(input_ids, attention_mask, **decoder_arguments)
        x = out.last_hidden_state
        if input_ids is None or config.pad_token_id is None:
            x = x[:, -1]
        else:
            is_token = jnp.asarray(input_ids) != config.pad_token_id
            last = jnp.argmax(
                jnp.arange(x.shape[1], dtype=jnp.int32)[None] * is_token.astype(jnp.int32), axis=1
            )
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = self.score(x[:, None])[:, 0]
        loss = None
        if labels is not None:
            loss = sequence_loss_sum(config, logits, labels) / sequence_loss_count(config, labels)
        return SequenceClassifierOutputWithPast(
            logits, loss, out.past_key_values, out.hidden_states, out.attentions
        )


class Phi3ForTokenClassification(_ModelWithHead):
    """The decoder with a dropout and a linear `score`, with bias, on every token."""

    def _add_head(self, config: Phi3Config, linear: Callable[..., Linear]) -> None:
        rates = (config.classifier_dropout, config.hidden_dropout, 0.1)
        self.classifier_dropout = next(rate for rate in rates if rate is not None)
        self.score = linear({"labels": config.num_labels}, bias=True)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        *,
        labels: Int[Array, "B T"] | None = None,
        num_items_in_batch: Int[Array, ""] | int | None = None,
        **decoder_arguments: Any,
    ) -> TokenClassifierOutput:
        """Returns the logits, in float32, of every token's class.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: each token's class, -100 where it does not count; they are not shifted.
            num_items_in_batch: divides the summed loss in place of this batch's count of labels.
            decoder_arguments: all other arguments of `Phi3Model`; `rngs` turns dropout on here too.

        Raises:
            UserError: as `Phi3Model`; labels of another shape or not below `config.num_labels`.
        """
        if labels is not None:
            labels = check_labels(labels, batch_shape(input_ids, decoder_arguments), self.config.num_labels)
        rngs = decoder_arguments.pop("rngs", None)
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        decoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        out = self.model(input_ids, attention_mask, rngs=decoder_key, **decoder_arguments)
        logits = self.score(dropout(out.last_hidden_state, self.classifier_dropout, head_key))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(logits, loss, out.hidden_states, out.attentions)
