"""Checkpoints: saving and restoring with Orbax, the folders of steps, and reading a step without Orbax."""
