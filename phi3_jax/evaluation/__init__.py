"""Evaluation of models: scores of texts under any rope, perplexity."""

from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.scorer import Scorer

__all__ = ["Scorer", "perplexity"]
