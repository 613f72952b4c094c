"""Scoring: tasks to requests, requests to packed rows, rows to log-probabilities."""
