"""The loss on held-out documents, over all and for each source."""

import math
from functools import cached_property

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from easylm_mling.config import RunConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.loader import Batch, holdout_rows, to_device
from easylm_mling.data.tokenizer import Tokenizer
from easylm_mling.metrics import finite, mean_loss
from easylm_mling.sharding import BATCH_AXES, own_rows
from easylm_mling.step import jit_eval_step


class Validation:
    """Called with parameters, gives `{"loss", "sources": {name: loss}}` in nats a token, None where nothing is held out,
    and the same as `bits_per_byte` of text and `sources_bits_per_byte`, which models of other tokenizers can be compared by.

    The rows are read at the first call and kept: they are the same for the whole run, at most eval.rows_per_source each.
    """

    def __init__(self, config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, mesh: Mesh):
        self.config, self.catalog, self.mesh = config, catalog, mesh
        self.names, self.tokenizer = list(config.data.sources), tokenizer
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

    @cached_property
    def bytes(self) -> np.ndarray:
        """float64 [sources]: bytes of the text that the rows' targets stand for. NaN if one of them is unknown."""
        sizes, rows = self.tokenizer.bytes_of_pieces, self.rows
        # Some tokenizers put a space before every text, which is not the text's.
        added = sizes[self.tokenizer.encode(["a"])[0]].sum() - 1
        begun = (rows["tokens"] == self.tokenizer.bos_id) & (rows["loss_mask"] > 0)
        of_rows = np.sum(np.where(rows["loss_mask"] > 0, sizes[rows["targets"]], 0.0) - added * begun, axis=-1)
        return np.bincount(rows["source"], of_rows, len(self.names))

    def __call__(self, params: dict) -> dict:
        sums, counts = np.zeros(len(self.names)), np.zeros(len(self.names))
        for start in range(0, len(self.rows["source"]), self.rows_per_batch):
            batch = {key: v[start + self.own.start : start + self.own.stop] for key, v in self.rows.items()}
            entropy, targets = self.eval_step(params, to_device(batch, self.mesh, PartitionSpec(BATCH_AXES)))
            sums += np.asarray(entropy, np.float64)
            counts += np.asarray(targets, np.float64)
        found = zip(self.names, sums, counts, self.bytes, strict=True)
        each = {n: (mean_loss(s, c), bits_per_byte(s, b)) for n, s, c, b in found if c}
        return {
            "loss": mean_loss(sums.sum(), counts.sum()),
            "bits_per_byte": bits_per_byte(sums.sum(), self.bytes.sum()),
            "sources": {n: loss for n, (loss, _) in each.items()},
            "sources_bits_per_byte": {n: bits for n, (_, bits) in each.items()},
        }


def bits_per_byte(nats: float, size: float) -> float | None:
    return finite(float(nats) / math.log(2) / float(size)) if size else None
