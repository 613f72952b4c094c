"""The model: its parameter table, its sharding, and the decoder as pure functions of both."""
