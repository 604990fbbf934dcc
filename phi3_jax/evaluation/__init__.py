"""How good a model is: perplexity under any rope, metrics, reports and plots."""

from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.scorer import Scorer

__all__ = ["Scorer", "perplexity"]
