"""Tools: a forecast of what a run reads, an audit of what it has read, and tokenising ahead of it."""
