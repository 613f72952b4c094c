"""The mixer: files -> units -> blocks -> windows -> documents -> tokens -> rows -> lanes -> batches.

`catalog` lists and cuts the files (sources/), `shuffle` orders an epoch, `streams` turns windows into one token stream a lane and
source, `mixture` says which source each row has, and `loader` puts the batches together. Only `loader` knows jax.
"""
