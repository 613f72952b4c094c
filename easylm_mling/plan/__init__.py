"""The plan: memory, speed and cost of a run by the TPU's own compiler, before a chip is paid for."""
