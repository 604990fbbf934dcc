"""Counts from shapes what a step of a model costs, and lists what chips can do; nothing is compiled here."""
