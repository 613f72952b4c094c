"""`easylm-mling report RUN`: one page about a run, made from its records alone, that needs no network to be read."""
