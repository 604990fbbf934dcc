"""The heads on the decoder: causal language model, sequence and token classification."""

from typing import Any

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
from phi3_jax.model.arguments import is_concrete
from phi3_jax.model.decoder import Phi3Model
from phi3_jax.model.layers import Linear, dropout, matmul
from phi3_jax.model.losses import (
    IGNORE_INDEX,
    cross_entropy,
    problem_type,
    sequence_loss_count,
    sequence_loss_sum,
)
from phi3_jax.model.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.parallel.sharding import constrain, gather


class _Headed(Phi3PreTrainedModel):
    """A decoder under the name `model`, as in the checkpoint, and a head beside it."""

    model: Phi3Model

    @property
    def decoder(self) -> Phi3Model:
        return self.model

    @property
    def config(self) -> Phi3Config:  # type: ignore[override]
        return self.model.config


class Phi3ForCausalLM(_Headed, GenerationMixin):
    """The decoder with a language-model head, tied to the embedding or of its own.

    Arguments as in `Phi3Model`.
    """

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.generation_config = GenerationConfig.from_model(config)
        self.model = Phi3Model(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else _head(config, "vocab", config.vocab_size, rngs, dtype, mesh)
        )

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
        """Logits, in float32, of the token after each given one.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: the token ids themselves, -100 where nothing is to be predicted; they are shifted here.
            logits_to_keep: 0: logits at every position; n: at the last n; an array: at those positions,
                [kept] for all rows alike or [B, kept].
            num_logits_to_keep: the older name of `logits_to_keep`.
            num_items_in_batch: divides the summed loss in place of this batch's count of labels.
            decoder_arguments: everything else that `Phi3Model` takes.

        Raises:
            ValueError: as `Phi3Model`; labels of another shape or outside the vocabulary, or together with
                `logits_to_keep`; positions to keep that there are not.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        if labels is not None:
            if np.ndim(keep) or keep != 0:
                raise UserError("labels need the logits of every position; leave logits_to_keep at 0")
            labels = _checked_labels(
                labels, _batch_shape(input_ids, decoder_arguments), self.config.vocab_size
            )
        last = (int(keep) or None) if np.ndim(keep) == 0 else None
        out = self.model(input_ids, attention_mask, hidden_states_to_keep=last, **decoder_arguments)
        x = out.last_hidden_state if np.ndim(keep) == 0 else _kept(out.last_hidden_state, keep)
        fresh = decoder_arguments.get("past_key_values") is None
        whole = last is None and np.ndim(keep) == 0
        logits = self.logits(x, "length" if fresh and whole else None)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **_carried(out))

    def logits(
        self, hidden_states: Float[Array, "B T D"], length: str | None = None
    ) -> Float[Array, "B T V"]:
        """The head on what the decoder gives, in float32; `length`: the logical axis of T on a mesh."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        logits = matmul(hidden_states, gather(weight[...], self.model.mesh, weight.axes))
        return constrain(logits, self.model.mesh, "batch", length, "vocab")

    def _vocabulary_weights(self) -> list[nnx.Param]:
        own = [] if self.lm_head is None else [self.lm_head.weight]
        return [*super()._vocabulary_weights(), *own]


class Phi3ForSequenceClassification(_Headed):
    """The decoder with a linear `score` on each row's last token that is not padding.

    Arguments as in `Phi3Model`; `config.num_labels` and `config.problem_type` say what is predicted.
    """

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.model = Phi3Model(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.score = _head(config, "labels", config.num_labels, rngs, dtype, mesh)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        *,
        labels: Num[Array, "..."] | None = None,
        **decoder_arguments: Any,
    ) -> SequenceClassifierOutputWithPast:
        """One row of logits, float32, for each row of tokens.

        The token chosen is the rightmost whose id is not `pad_token_id`: ids decide, not the mask. Given
        `inputs_embeds`, it is the last one.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: class numbers [B] (-100: not counted), numbers [B] or [B, num_labels] for regression, or
                0s and 1s [B, num_labels] for several classes at once.
            decoder_arguments: everything else that `Phi3Model` takes.

        Raises:
            ValueError: as `Phi3Model`; several rows and no `pad_token_id`; labels that do not fit.
        """
        config = self.config
        batch, _ = _batch_shape(input_ids, decoder_arguments)
        if config.pad_token_id is None and batch != 1:
            raise UserError(
                f"a batch of {batch} rows needs pad_token_id, to find each row's last token; "
                "set it in the config or classify one row at a time"
            )
        if labels is not None:
            labels = _checked_classes(labels, config, batch)
        out = self.model(input_ids, attention_mask, **decoder_arguments)
        x = out.last_hidden_state
        if input_ids is None or config.pad_token_id is None:
            x = x[:, -1]
        else:
            real = jnp.asarray(input_ids) != config.pad_token_id
            last = jnp.argmax(jnp.arange(x.shape[1]) * real, axis=1)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = self.score(x[:, None])[:, 0]
        loss = None
        if labels is not None:
            loss = sequence_loss_sum(config, logits, labels) / sequence_loss_count(config, labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **_carried(out))


class Phi3ForTokenClassification(_Headed):
    """The decoder with a dropout and a linear `score`, with bias, on every token.

    Arguments as in `Phi3Model`.
    """

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.model = Phi3Model(config, rngs=rngs, dtype=dtype, mesh=mesh)
        rates = (config.classifier_dropout, config.hidden_dropout, 0.1)
        self.classifier_dropout = next(rate for rate in rates if rate is not None)
        self.score = _head(config, "labels", config.num_labels, rngs, dtype, mesh, bias=True)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        *,
        labels: Int[Array, "B T"] | None = None,
        num_items_in_batch: Int[Array, ""] | int | None = None,
        **decoder_arguments: Any,
    ) -> TokenClassifierOutput:
        """Logits, in float32, of every token's class.

        Args:
            input_ids: token ids.
            attention_mask: as in `Phi3Model`.
            labels: each token's class, -100 where it does not count; not shifted.
            num_items_in_batch: divides the summed loss in place of this batch's count of labels.
            decoder_arguments: everything else that `Phi3Model` takes; `rngs` turns dropout on here too.

        Raises:
            ValueError: as `Phi3Model`; labels of another shape or not below `config.num_labels`.
        """
        if labels is not None:
            labels = _checked_labels(
                labels, _batch_shape(input_ids, decoder_arguments), self.config.num_labels
            )
        rngs = decoder_arguments.pop("rngs", None)
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        decoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        out = self.model(input_ids, attention_mask, rngs=decoder_key, **decoder_arguments)
        logits = self.score(dropout(out.last_hidden_state, self.classifier_dropout, head_key))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


def _head(
    config: Phi3Config,
    axis: str,
    size: int,
    rngs: nnx.Rngs,
    dtype: Any,
    mesh: Mesh | None,
    *,
    bias: bool = False,
) -> Linear:
    return Linear(
        {"embed": config.hidden_size},
        {axis: size},
        std=config.initializer_range,
        rngs=rngs,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        bias=bias,
    )


def _kept(x: Float[Array, "B T D"], keep: Any) -> Float[Array, "B kept D"]:
    """The positions that `logits_to_keep` asks for."""
    if np.ndim(keep) == 0:
        return x if keep == 0 else x[:, -keep:]
    keep = keep if isinstance(keep, jax.Array) else np.asarray(keep)
    batch, length, _ = x.shape
    if keep.ndim > 2 or keep.shape[:-1] not in ((), (batch,)) or not jnp.issubdtype(keep.dtype, jnp.integer):
        raise UserError(
            f"logits_to_keep is {keep.dtype}{list(keep.shape)}; "
            f"expected a number, or integers of shape [kept] or [{batch}, kept]"
        )
    if is_concrete(keep):
        values = np.asarray(keep)
        outside = values[(values < -length) | (values >= length)]
        if outside.size:
            raise UserError(f"logits_to_keep names position {outside[0]} of {length} tokens")
    return x[:, keep] if keep.ndim == 1 else x[jnp.arange(batch)[:, None], keep]


def _carried(out: BaseModelOutputWithPast) -> dict[str, Any]:
    """The parts of the decoder's output that a head hands on."""
    return {
        "past_key_values": out.past_key_values,
        "hidden_states": out.hidden_states,
        "attentions": out.attentions,
    }


def _batch_shape(input_ids: Any, decoder_arguments: dict[str, Any]) -> tuple[int, int]:
    given: Any = decoder_arguments.get("inputs_embeds") if input_ids is None else input_ids
    shape = np.shape(given)
    if len(shape) < 2:
        raise UserError(f"input_ids has shape {list(shape)}; expected [batch, length]")
    return shape[0], shape[1]


def _checked_labels(labels: Any, shape: tuple[int, ...], classes: int) -> Array:
    """Integer labels of the expected shape, each -100 or a class."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"labels is {labels.dtype}{list(labels.shape)}; expected integers of shape {list(shape)}"
        )
    if is_concrete(labels):
        values = np.asarray(labels)
        wrong = ((values < 0) | (values >= classes)) & (values != IGNORE_INDEX)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise UserError(
                f"labels[{', '.join(map(str, where))}] = {values[where]}; expected 0 to {classes - 1}, "
                f"or {IGNORE_INDEX} for what does not count"
            )
    return jnp.asarray(labels, jnp.int32)


def _checked_classes(labels: Any, config: Phi3Config, batch: int) -> Array:
    """Labels of a row each, in the form that the problem type asks for."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    problem, classes = problem_type(config, labels), config.num_labels
    if problem == "single_label_classification":
        return _checked_labels(labels.reshape(-1) if labels.size == batch else labels, (batch,), classes)
    fits = labels.size == batch if classes == 1 else labels.shape == (batch, classes)
    if not fits:
        raise UserError(
            f"labels has shape {list(labels.shape)}; {problem} with num_labels={classes} "
            f"needs {list((batch, classes) if classes > 1 else (batch,))}"
        )
    return jnp.asarray(labels)
