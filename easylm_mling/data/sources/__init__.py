"""Sources: from the file names in a config to documents."""
