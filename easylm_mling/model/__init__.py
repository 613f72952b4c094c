"""The model: its parameter table, its sharding, and the decoder as a pure function of both."""
