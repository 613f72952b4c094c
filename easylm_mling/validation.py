"""The loss on held-out documents, over all and for each source."""

from functools import cached_property

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from easylm_mling.config import RunConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.loader import Batch, holdout_rows, to_device
from easylm_mling.data.tokenizer import Tokenizer
from easylm_mling.metrics import mean_loss
from easylm_mling.sharding import BATCH_AXES, own_rows
from easylm_mling.step import jit_eval_step


class Validation:
    """Called with parameters, gives `{"loss", "sources": {name: loss}}` in nats a token, None where nothing is held out.

    The rows are read at the first call and kept: they are the same for the whole run, at most eval.rows_per_source each.
    """

    def __init__(self, config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, mesh: Mesh):
        self.config, self.catalog, self.tokenizer, self.mesh = config, catalog, tokenizer, mesh
        self.names = list(config.data.sources)
        self.rows_per_batch = config.train.batch_size // config.train.accumulation_steps
        self.own = own_rows(mesh, self.rows_per_batch)
        self.eval_step = jit_eval_step(config, mesh)

    @cached_property
    def rows(self) -> Batch:
        """All sources' rows one after another, filled up to whole batches with rows that have no targets."""
        count = self.config.eval.rows_per_source
        parts = [holdout_rows(self.config, self.catalog, self.tokenizer, name, count) for name in self.names]
        whole = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        padding = -len(whole["source"]) % self.rows_per_batch
        return {key: np.concatenate([v, np.zeros((padding, *v.shape[1:]), v.dtype)]) for key, v in whole.items()}

    def __call__(self, params: dict) -> dict:
        sums, counts = np.zeros(len(self.names)), np.zeros(len(self.names))
        for start in range(0, len(self.rows["source"]), self.rows_per_batch):
            batch = {key: v[start + self.own.start : start + self.own.stop] for key, v in self.rows.items()}
            entropy, targets = self.eval_step(params, to_device(batch, self.mesh, PartitionSpec(BATCH_AXES)))
            sums += np.asarray(entropy, np.float64)
            counts += np.asarray(targets, np.float64)
        by_source = {n: mean_loss(s, c) for n, s, c in zip(self.names, sums, counts, strict=True) if c}
        return {"loss": mean_loss(sums.sum(), counts.sum()), "sources": by_source}
