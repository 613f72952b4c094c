"""Tokenization: text to token ids and back, and the tokenizer's files."""
