"""Labels for rows that have none: a fine-tuned classifier on texts in memory, or on a file of any size."""

from phi3_jax.classification.classifier import Classifier
from phi3_jax.classification.classify import Summary, classify_file

__all__ = ["Classifier", "Summary", "classify_file"]
