"""Rows of supervised data sets to conversations: the recipe, phrasings, and what must not be trained on."""
