"""One run: from its directory and data through the training loop to its closing table."""
