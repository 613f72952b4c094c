"""Tools: what a run will read, what it has read, and tokens made ahead of it."""
