"""A fine-tuned classifier for rows without labels: texts in memory, or a file of any size."""

from phi3_jax.classification.classifier import Classifier
from phi3_jax.classification.classify import Summary, classify_file

__all__ = ["Classifier", "Summary", "classify_file"]
