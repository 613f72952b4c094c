"""Hugging Face directories: the only code, beside the parameter table, that knows their names."""
