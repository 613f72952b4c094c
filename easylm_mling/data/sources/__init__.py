"""Sources: from file names to documents."""
