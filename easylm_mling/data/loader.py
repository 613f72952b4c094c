"""Global batches for the trainer: each host reads, in a background thread, the rows of its own lanes and no others."""

import contextlib
import json
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_mling.config import RunConfig
from easylm_mling.data.blocks import EpochOrder, Window, epoch_windows
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.mixture import ROWS, initial_state, integer_weights, next_round, own_state, row_arrays
from easylm_mling.data.streams import LaneStream, Shelf, join_documents
from easylm_mling.data.tokenizer import Tokenizer

_BATCHES_AHEAD = 2
# One bad record among the first ten is no reason to stop a run.
_MIN_RECORDS = 1000
_HOLDOUT_WINDOWS = 20_000

Batch = dict[str, np.ndarray]


class DataError(ValueError):
    """The data is too damaged to train on. The message is one line that names the source and the way out."""


class Loader:
    """An endless iterator of (batch, state after it) for the lanes of one host.

    The batch's arrays are [rows, T] (see mixture.row_arrays), with `source`, int32 [rows]; row r of the *global* batch
    belongs to lane r // (batch_size // V). The state, int64 [V, S, C] (see mixture.COUNTERS), is a copy that counts
    exactly the batches handed out so far, whatever has been read ahead; of other hosts' lanes it holds `rows` only, and
    the maximum over all hosts' states is the whole run's. From that the same batches follow, on any number of hosts.
    """

    def __init__(
        self,
        config: RunConfig,
        catalog: Catalog,
        tokenizer: Tokenizer,
        state: np.ndarray | None = None,
        lanes: range | None = None,
        quarantine: str | Path | None = None,
    ):
        """`lanes`: this host's, all by default. `quarantine`: a JSONL file that bad records are appended to.

        Raises ConfigError for a state of other lanes or sources. What goes wrong in reading is raised by `next`.
        """
        assert list(catalog.sources) == list(config.data.sources), "the catalog is of another config"
        self._config, self._tokenizer, self._quarantine = config, tokenizer, quarantine
        self._lanes = range(config.lanes) if lanes is None else lanes
        self._orders = [EpochOrder(s, config.data.seed, config.data.block_bytes) for s in catalog.sources.values()]
        shape = (config.lanes, len(self._orders), self._lanes)
        self._state = initial_state(*shape) if state is None else own_state(np.asarray(state), *shape)
        # Bad and good records of the windows entered by this process.
        self._records = np.zeros((len(self._orders), 2), np.int64)
        self._closed = False
        self._batches = self._make_batches()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="easylm-loader")
        self._ahead = deque(self._thread.submit(next, self._batches) for _ in range(_BATCHES_AHEAD))

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        """Raises ConfigError or DataError, now and ever after, if the data cannot be read on."""
        assert not self._closed, "the loader is closed"
        item = self._ahead[0].result()
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(next, self._batches))
        return item

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stop the background thread after, at most, the row it is at."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()

    def _make_batches(self) -> Generator[tuple[Batch, np.ndarray], None, None]:
        data, own = self._config.data, self._lanes
        shares = integer_weights([source.weight for source in data.sources.values()])
        per_lane = self._config.train.batch_size // self._config.lanes
        streams: dict[tuple[int, int], LaneStream] = {}
        with contextlib.closing(Shelf()) as shelf:
            while True:
                tokens = np.empty((len(own), per_lane, data.sequence_length + 1), np.int32)
                sources = np.empty((len(own), per_lane), np.int32)
                for turn in range(per_lane):
                    dealt = next_round(shares, data.seed, self._state[..., ROWS])
                    sources[:, turn] = dealt[own.start : own.stop]
                    for i, lane in enumerate(own):
                        if self._closed:
                            return
                        key = (lane, int(dealt[lane]))
                        if key not in streams:
                            streams[key] = self._stream(*key, shelf)
                        tokens[i, turn] = streams[key].take(data.sequence_length)
                    self._state[np.arange(len(dealt)), dealt, ROWS] += 1
                batch = row_arrays(tokens.reshape(-1, data.sequence_length + 1), self._tokenizer.bos_id)
                yield {**batch, "source": sources.reshape(-1)}, self._state.copy()

    def _stream(self, lane: int, source: int, shelf: Shelf) -> LaneStream:
        order, lanes, counters = self._orders[source], self._config.lanes, self._state[lane, source]
        account = lambda window: self._account(source, window)  # noqa: E731
        return LaneStream(order, self._tokenizer, lane, lanes, counters, shelf, account)

    def _account(self, source: int, window: Window):
        """Write the bad records of a window down, and raise DataError if they have become too many."""
        name, limit = self._orders[source].source.name, self._config.data.max_bad_fraction
        if window.bad and self._quarantine is not None:
            with open(self._quarantine, "a", encoding="utf-8") as file:
                for reason, path, offset, head in window.bad:
                    entry = {"source": name, "file": path, "offset": offset, "reason": reason}
                    file.write(json.dumps({**entry, "head": head.decode(errors="replace")}, ensure_ascii=False) + "\n")
        self._records[source] += len(window.bad), window.read
        bad, read = self._records[source].tolist()
        if bad + read >= _MIN_RECORDS and bad > limit * (bad + read):
            where = f"see {self._quarantine}" if self._quarantine else "a quarantine file would list them"
            raise DataError(
                f"data.sources.{name}: {bad} of {bad + read} records are bad, more than data.max_bad_fraction={limit}; "
                f"{where}; repair the files or raise the limit"
            )


def holdout_rows(config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, source: str, rows: int) -> Batch:
    """Up to `rows` rows of the source's held-out documents, the same on every host and at every time.

    In the order of epoch 0. The last row may be padded (pad id; targets, mask, segment and position 0). No rows if
    nothing is held out, or nothing in the first 20,000 windows. Reads about rows * T * 4 / holdout_fraction bytes.
    Raises ConfigError for a damaged file.
    """
    length = config.data.sequence_length
    order = EpochOrder(catalog.sources[source], config.data.seed, config.data.block_bytes)
    parts, total = [np.zeros(0, np.int32)], 0
    for window in islice(epoch_windows(order, 0, "holdout"), _HOLDOUT_WINDOWS if rows else 0):
        if window.documents:
            parts.append(join_documents(tokenizer, [text.decode() for text in window.documents]))
            total += len(parts[-1])
        if total > rows * length:
            break
    count = min(rows, -(-total // length))
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    stream = np.concatenate(parts)[: count * length + 1]
    real = len(stream)
    stream = np.pad(stream, (0, count * length + 1 - real), constant_values=tokenizer.pad_id)
    batch = row_arrays(stream[index], tokenizer.bos_id)
    batch["loss_mask"][index[:, 1:] >= real] = 0
    batch["targets"][index[:, 1:] >= real] = 0
    for key in ("segment_ids", "positions"):
        batch[key][index[:, :-1] >= real] = 0
    return {**batch, "source": np.full(count, list(catalog.sources).index(source), np.int32)}


def to_device(batch: Batch, mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
    """Every host's rows as global arrays. `spec` is that of a [rows, T] array, such as P(("data", "fsdp"), None)."""
    shardings = {k: NamedSharding(mesh, PartitionSpec(*tuple(spec)[: v.ndim])) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(shardings[k], v) for k, v in batch.items()}
