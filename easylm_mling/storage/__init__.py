"""Storage: files and objects that appear whole, append-only records, retries, and the lease on a run directory."""
