"""Global batches for the trainer. Each host reads the rows of its own lanes only, in a background thread."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_mling.config import RunConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.estimates import estimate, tokens_per_byte
from easylm_mling.data.mixture import (
    EXTRA,
    ROWS,
    DataState,
    initial_state,
    mask_padding,
    next_round,
    own_state,
    row_arrays,
    substitute,
)
from easylm_mling.data.quarantine import Quarantine
from easylm_mling.data.shuffle import EpochOrder, Window, epoch_windows, open_orders
from easylm_mling.data.streams import LaneStream, SpillFile
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.data.weights import MixingPlan, make_plan, needs_estimates
from easylm_mling.errors import ConfigError, DataError

_BATCHES_AHEAD = 2
# One bad record among the first ten is no reason to stop a run.
_MIN_RECORDS = 1000
_HOLDOUT_WINDOWS = 20_000

Batch = dict[str, np.ndarray]


class Loader:
    """An iterator of (batch, state after it) for the lanes of one host; endless unless a source that ends is needed.

    The batch's arrays are [rows, T] (see mixture.row_arrays), with `source`, int32 [rows]; row r of the *global* batch
    belongs to lane r // (batch_size // V). The state (see mixture.DataState) is a copy that counts exactly the batches
    handed out so far, whatever has been read ahead. From all hosts' states together, mixture.whole_state, the same
    batches follow, on any number of hosts. Where a lane is due a row that it cannot have (see SourceConfig.when_used_up),
    the iterator ends before that batch, for good, and `ended` says why: other hosts' iterators may go on, so a trainer
    must end all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        catalog: Catalog,
        tokenizer: Tokenizer,
        state: DataState | None = None,
        lanes: range | None = None,
        quarantine: str | Path | None = None,
        plan: MixingPlan | None = None,
    ):
        """`lanes`: this host's, all by default. `quarantine`: the file that lists bad records (see data/quarantine.py).

        `plan`: that of the run, made here if it is not given. Raises ConfigError for a state of other lanes or sources,
        and for a source that would end the run before its first step. What goes wrong in reading is raised by `next`.
        """
        assert list(catalog.sources) == list(config.data.sources), "the catalog is of another config"
        self._config, self._tokenizer = config, tokenizer
        self._lanes = range(config.lanes) if lanes is None else lanes
        if plan is None:
            known = tokens_per_byte(estimate(catalog, tokenizer)) if needs_estimates(config) else None
            plan = make_plan(config, catalog, known)
        self._plan = plan
        self.orders = open_orders(config, catalog, plan)
        self._cache = TokenCache(config.data.token_cache, tokenizer) if config.data.token_cache else None
        self.lanes_with_data = [order.blocks_up_to(config.lanes) for order in self.orders]
        self._check_lanes_with_data()
        counts = [len(s.languages) for s in catalog.sources.values()]
        self._first_language = [sum(counts[:i]) for i in range(len(counts) + 1)]
        shape = (config.lanes, len(self.orders), self._lanes)
        self._state = initial_state(*shape, sum(counts)) if state is None else own_state(state, *shape)
        self._quarantine = Quarantine(quarantine, list(catalog.sources), state and state.lanes) if quarantine else None
        # Bad and good records of the windows entered by this process.
        self._records = np.zeros((len(self.orders), 2), np.int64)
        # For each lane, the sources whose streams have ended.
        self._spent: dict[int, set[int]] = {lane: set() for lane in self._lanes}
        self.ended = ""
        self._closed = False
        self._batches = self._make_batches()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="easylm-loader")
        self._ahead = deque(self._thread.submit(next, self._batches) for _ in range(_BATCHES_AHEAD))

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        return self

    def __next__(self) -> tuple[Batch, DataState]:
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
        if self._quarantine:
            self._quarantine.close()

    def flush(self):
        """The bad records of what was handed out are on disk when it returns; raises OSError if there is no room for them."""
        if self._quarantine:
            self._quarantine.flush()

    def _make_batches(self) -> Generator[tuple[Batch, DataState], None, None]:
        data, own, lanes = self._config.data, self._lanes, self._state.lanes
        per_lane = self._config.train.batch_size // self._config.lanes
        streams: dict[tuple[int, int], LaneStream] = {}
        with contextlib.closing(SpillFile()) as spill_file:
            while True:
                tokens = np.empty((len(own), per_lane, data.sequence_length + 1), np.int32)
                sources, real = np.empty((2, len(own), per_lane), np.int32)
                for turn in range(per_lane):
                    dealt = next_round(self._plan, data.seed, lanes[..., ROWS], self.lanes_with_data)
                    for i, lane in enumerate(own):
                        if self._closed:
                            return
                        got = self._take(streams, spill_file, lane, int(dealt[lane]))
                        if got is None:
                            return
                        sources[i, turn], row = got
                        tokens[i, turn, : len(row)], real[i, turn] = row, len(row)
                    lanes[np.arange(len(dealt)), dealt, ROWS] += 1
                batch = row_arrays(tokens.reshape(-1, data.sequence_length + 1), self._tokenizer.bos_id)
                mask_padding(batch, real.reshape(-1), self._tokenizer.pad_id)
                yield {**batch, "source": sources.reshape(-1)}, self._state.copy()

    def _take(self, streams: dict, spill_file: SpillFile, lane: int, due: int) -> tuple[int, np.ndarray] | None:
        """(source, its row) for a lane that is due a row of source `due`; None if the run ends here."""
        data, counters = self._config.data, self._state.lanes[lane]
        shares = self._plan.shares_at(int(counters[:, ROWS].sum()))
        source: int | None = due
        while source is not None:
            if source not in self._spent[lane]:
                if (lane, source) not in streams:
                    streams[lane, source] = self._stream(lane, source, spill_file)
                row = streams[lane, source].take(data.sequence_length)
                if len(row):
                    counters[source, EXTRA] += source != due
                    return source, row
                self._spent[lane].add(source)
                del streams[lane, source]
            name = self.orders[source].source.name
            if data.sources[name].when_used_up == "stop":
                self.ended = (
                    f"data.sources.{name} is used up (max_epochs={data.sources[name].max_epochs}) in lane {lane}"
                )
                return None
            source = substitute(shares, data.seed, lane, counters[:, EXTRA], self._spent[lane])
        self.ended = f"every source is used up in lane {lane}"
        return None

    def _stream(self, lane: int, source: int, spill_file: SpillFile) -> LaneStream:
        order, counters = self.orders[source], self._state.lanes[lane, source]
        languages = self._state.languages[self._first_language[source] : self._first_language[source + 1]]
        account = lambda window: self._account(lane, source, window)  # noqa: E731
        lanes = self._config.lanes
        return LaneStream(order, self._tokenizer, lane, lanes, counters, languages, spill_file, account, self._cache)

    def _check_lanes_with_data(self):
        for order, lanes_with_data in zip(self.orders, self.lanes_with_data, strict=True):
            name = order.source.name
            if lanes_with_data < self._config.lanes and self._config.data.sources[name].when_used_up == "stop":
                raise ConfigError(
                    f"data.sources.{name}.when_used_up=stop: its max_epochs make only {lanes_with_data} blocks, one for each of so "
                    f"many of the {self._config.lanes} lanes, and the run would end at once; use redistribute, fewer "
                    "data.lanes or a smaller data.block_bytes"
                )

    def _account(self, lane: int, source: int, window: Window):
        """Write the bad records of a window down, and raise DataError if they have become too many."""
        name, limit = self.orders[source].source.name, self._config.data.max_bad_fraction
        if window.bad and self._quarantine:
            self._quarantine.write(lane, source, self._state.lanes[lane, source], window.bad)
        self._records[source] += len(window.bad), window.read
        bad, read = self._records[source].tolist()
        if bad + read >= _MIN_RECORDS and bad > limit * (bad + read):
            where = f"see {self._quarantine.path}" if self._quarantine else "a quarantine file would list them"
            raise DataError(
                f"data.sources.{name}: {bad} of {bad + read} records are bad, more than data.max_bad_fraction={limit}; "
                f"{where}; repair the files or raise the limit"
            )


def holdout_rows(config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, source: str, rows: int) -> Batch:
    """Up to `rows` rows of the source's held-out documents, the same on every host and at every time.

    Its first documents in the order of epoch 0, language by language. The last row may be padded (pad id; targets, mask,
    segment and position 0). With `language`, int32 [rows, T]: of each token, its place in Source.languages. No rows if
    nothing is held out, or nothing in the first 20,000 windows. Reads about rows * T * 4 / holdout_fraction bytes.
    Raises ConfigError for a damaged file.
    """
    length = config.data.sequence_length
    order = EpochOrder(catalog.sources[source], config.data.seed, config.data.block_bytes)
    documents, languages, total = [], [], 0
    for window in islice(epoch_windows(order, 0, "holdout"), _HOLDOUT_WINDOWS if rows else 0):
        for text, place in zip(window.documents, window.provenance.tolist(), strict=True):
            if total <= rows * length:
                documents.append(join_documents(tokenizer, [text.decode()]))
                languages.append(int(order.source.unit_languages[place[0]]))
                total += len(documents[-1])
        if total > rows * length:
            break
    count = min(rows, -(-total // length))
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    by_language = np.argsort(np.array(languages, np.int64), kind="stable").tolist()
    stream = np.concatenate([np.zeros(0, np.int32), *(documents[i] for i in by_language)])[: count * length + 1]
    lengths = [len(documents[i]) for i in by_language]
    spoken = np.repeat(np.array(languages, np.int32)[by_language], lengths)[: count * length + 1]
    real = len(stream)
    stream, spoken = (
        np.pad(x, (0, count * length + 1 - real), constant_values=fill)
        for x, fill in ((stream, tokenizer.pad_id), (spoken, 0))
    )
    batch = row_arrays(stream[index], tokenizer.bos_id)
    mask_padding(batch, real - np.arange(count) * length, tokenizer.pad_id)
    of_source = np.full(count, list(catalog.sources).index(source), np.int32)
    return {**batch, "source": of_source, "language": spoken[index[:, :length]]}


def to_device(batch: Batch, mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
    """Every host's rows as global arrays. `spec` is that of a [rows, T] array, such as P(("data", "fsdp"), None)."""
    shardings = {k: NamedSharding(mesh, PartitionSpec(*tuple(spec)[: v.ndim])) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(shardings[k], v) for k, v in batch.items()}
