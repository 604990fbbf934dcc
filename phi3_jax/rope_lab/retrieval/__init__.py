"""Retrieval tasks: prompts, answers, scores, reports."""
