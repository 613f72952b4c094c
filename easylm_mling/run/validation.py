"""Validation: the loss on held-out documents, over all and for each source and language."""

import copy
import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
from jax.sharding import Mesh

from easylm_mling.config import RunConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.documents import has_conversations
from easylm_mling.data.holdout import holdout_rows
from easylm_mling.data.loader import Batch
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.model.sharding import own_rows
from easylm_mling.monitoring.metrics import finite, mean_loss
from easylm_mling.run.host_sync import place_batch
from easylm_mling.training.step import jit_eval_step


class Validation:
    """Measures the mean loss of held-out text, in nats a token and in bits a byte; None where there is no text.

    A call with the parameters returns `{"loss", "sources": {name: loss}, "languages": {name: {language: loss}}}`, where
    `languages` has the sources of more than one language. `bits_per_byte`, `sources_bits_per_byte` and
    `languages_bits_per_byte` hold the same for each byte of text: they compare models of different tokenizers. Where there are
    conversations `stop_rate`, `sources_stop_rate` and `languages_stop_rate` hold the mean probability that the model gives to
    the end token right behind an answer.

    The rows are read at the first call and kept: at most eval.rows_per_source of each source, the same for the whole run.
    A row that holds several languages is evaluated once for each of them.
    """

    def __init__(self, config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, mesh: Mesh):
        self.config, self.catalog, self.tokenizer, self.mesh = config, catalog, tokenizer, mesh
        self.rows_per_batch = config.train.batch_size // config.train.accumulation_steps
        self.own = own_rows(mesh, self.rows_per_batch, config.mesh.sequence)
        # Losses are summed by groups: of each source its languages.
        self.groups = [(name, language) for name, s in catalog.sources.items() for language in s.languages]
        self.eval_step = jit_eval_step(config, mesh, len(self.groups))

    @cached_property
    def rows(self) -> Batch:
        """All sources' rows one after another, filled up to whole batches with rows that have no targets.

        `source` numbers the groups.
        """
        count, parts, first = self.config.eval.rows_per_source, [], 0
        for name, source in self.catalog.sources.items():
            parts.append(by_language(holdout_rows(self.config.mixer, self.catalog, self.tokenizer, name, count), first))
            first += len(source.languages)
        whole = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        talks = [has_conversations(self.catalog.sources[name]) for name, _ in self.groups]
        ends = answer_ends(whole, self.tokenizer) * np.array(talks, np.float32)[whole["source"]][:, None]
        return self._in_batches({**whole, "ends": ends} if ends.any() else whole)

    def halves(self) -> tuple["Validation", "Validation"]:
        """Return the same over the first half of each group's rows, and over the rest. At most one document is in both.

        A group with one row is in the first half only.
        """
        rows = {key: v[self.rows["loss_mask"].any(axis=-1)] for key, v in self.rows.items()}
        groups = rows["source"]
        place = np.array([np.count_nonzero(groups[:i] == g) for i, g in enumerate(groups)], np.int64)
        first = place < -(-np.bincount(groups, minlength=len(self.groups))[groups] // 2)
        parts = []
        for kept in (first, ~first):
            part = copy.copy(self)
            part.__dict__["rows"] = self._in_batches({key: v[kept] for key, v in rows.items()})
            part.__dict__.pop("bytes", None)
            parts.append(part)
        return parts[0], parts[1]

    def _in_batches(self, rows: Batch) -> Batch:
        padding = -len(rows["source"]) % self.rows_per_batch
        return {key: np.concatenate([v, np.zeros((padding, *v.shape[1:]), v.dtype)]) for key, v in rows.items()}

    @cached_property
    def bytes(self) -> np.ndarray:
        """float64 [groups]: bytes of text of the rows' targets; NaN if that of one target is unknown."""
        sizes, rows = self.tokenizer.bytes_of_pieces, self.rows
        # Some tokenizers add a space before every text.
        added = sizes[self.tokenizer.encode(["a"])[0]].sum() - 1
        begun = (rows["tokens"] == self.tokenizer.bos_id) & (rows["loss_mask"] > 0)
        of_rows = np.sum(np.where(rows["loss_mask"] > 0, sizes[rows["targets"]], 0.0) - added * begun, axis=-1)
        return np.bincount(rows["source"], of_rows, len(self.groups))

    def __call__(self, params: dict) -> dict:
        """The losses of these parameters. Collective."""
        sums = np.zeros((4 if "ends" in self.rows else 2, len(self.groups)))
        for start in range(0, len(self.rows["source"]), self.rows_per_batch):
            batch = {key: v[start + self.own.start : start + self.own.stop] for key, v in self.rows.items()}
            sums += np.asarray(
                self.eval_step(params, place_batch(batch, self.mesh, self.config.mesh.sequence)), np.float64
            )
        entropy, targets, *stops = sums
        return {
            **self._means("{}", mean_loss, entropy, targets),
            **self._means("{}_bits_per_byte", bits_per_byte, entropy, self.bytes),
            **(self._means("{}_stop_rate", mean_loss, *stops) if stops else {}),
        }

    def _means(self, name: str, mean: Callable, sums: np.ndarray, sizes: np.ndarray) -> dict:
        """`mean` over everything, of each source and of each language that has any text."""
        names = [source for source, _ in self.groups]
        of = {source: [i for i, n in enumerate(names) if n == source] for source in names}
        each = {s: mean(sums[i].sum(), sizes[i].sum()) for s, i in of.items() if sizes[i].any()}
        of_several = {
            s: {self.groups[g][1]: mean(sums[g], sizes[g]) for g in i if sizes[g]} for s, i in of.items() if len(i) > 1
        }
        whole = name.removeprefix("{}_") if name != "{}" else "loss"
        return {
            whole: mean(sums.sum(), sizes.sum()),
            name.format("sources"): each,
            name.format("languages"): of_several,
        }


def by_language(rows: Batch, first: int) -> Batch:
    """`rows` of one source (holdout.holdout_rows), copied for each language in a row, with the targets of that language only.

    `source` becomes `first` plus the number of the language.
    """
    spoken, targets = rows["language"], rows["loss_mask"] > 0
    of_rows = [np.unique(spoken[i][targets[i]]) for i in range(len(spoken))]
    index = np.repeat(np.arange(len(spoken)), [len(x) for x in of_rows])
    language = np.concatenate([np.zeros(0, np.int32), *of_rows]).astype(np.int32)
    copies = {key: v[index] for key, v in rows.items() if key != "language"}
    kept = spoken[index] == language[:, None]
    copies["targets"], copies["loss_mask"] = copies["targets"] * kept, copies["loss_mask"] * kept
    return {**copies, "source": first + language}


def answer_ends(rows: Batch, tokenizer: Tokenizer) -> np.ndarray:
    """float32 [rows, T]: 1 where the target is the token that ends an answer: a control token, the last that is trained.

    An answer that was cut, or is trained without its end, has none.
    """
    trained = rows["loss_mask"] > 0
    last = trained & ~np.pad(trained[:, 1:], ((0, 0), (0, 1)))
    return (last & np.isin(rows["targets"], sorted({*tokenizer.control_ids, tokenizer.eos_id}))).astype(np.float32)


def bits_per_byte(nats: float, size: float) -> float | None:
    """`nats` over `size` bytes as bits a byte; None for no bytes."""
    return finite(float(nats) / math.log(2) / float(size)) if size else None
