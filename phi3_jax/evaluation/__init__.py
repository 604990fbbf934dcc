"""Evaluation of models: perplexity under any rope, pass keys, rope search, reports and plots."""

from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.scorer import Scorer

__all__ = ["Scorer", "perplexity"]
