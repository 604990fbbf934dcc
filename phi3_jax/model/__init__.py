"""The model: layers, rope, attention, cache, decoder and heads."""

from phi3_jax.model.decoder import Phi3Model
from phi3_jax.model.heads import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification
from phi3_jax.model.phi3small import (
    Phi3SmallForCausalLM,
    Phi3SmallForSequenceClassification,
    Phi3SmallForTokenClassification,
    Phi3SmallModel,
)
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.model.quantizing import quantize_model

__all__ = [
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3Model",
    "Phi3PreTrainedModel",
    "Phi3SmallForCausalLM",
    "Phi3SmallForSequenceClassification",
    "Phi3SmallForTokenClassification",
    "Phi3SmallModel",
    "quantize_model",
]
