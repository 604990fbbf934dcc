"""Answers files of prompts by continuous batching; a killed run can be resumed."""

from phi3_jax.batch.answers import Answer
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.requests import BadRequestError, Request, read_requests

__all__ = ["Answer", "BadRequestError", "Engine", "Request", "read_requests"]
