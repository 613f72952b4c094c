"""The mixer: files -> units -> blocks -> windows -> documents -> tokens -> rows -> lanes -> batches.

catalog (with listing and layouts) lists and cuts the files; readers (with files, lines and tables) gives the documents
of a unit; blocks orders an epoch and
shuffles; streams turns windows into one endless token stream per lane and source; mixture says which source each row
has; loader puts the batches together. Only loader knows jax.
"""
