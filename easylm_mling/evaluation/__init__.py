"""Evaluation: scores of a model on tasks, from its requests to its table."""
