"""The mixer: files -> units -> blocks -> windows -> documents -> tokens -> rows -> lanes -> batches.

`catalog` lists the files and cuts them (sources/). `shuffle` orders an epoch. `streams` turns windows into a token
stream for each lane and source. `mixture` chooses the source of each row. `loader` builds the batches, and alone knows jax.
"""
