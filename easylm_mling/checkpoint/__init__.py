"""Checkpoints: save and restore with Orbax, their folders, and reading them without it."""
