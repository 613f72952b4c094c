"""Hugging Face models in and out: import, export, verification, the model card."""
