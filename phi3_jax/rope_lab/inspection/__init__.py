"""Looks inside a model: attention by layer and head, and the angles of distances."""
