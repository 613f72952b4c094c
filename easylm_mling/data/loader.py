"""Global batches for the trainer. Each host reads the rows of its own lanes only, in a background thread."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.mixture import (
    EXTRA,
    PADDING,
    ROWS,
    TOKENS,
    Batch,
    DataState,
    batch_counts,
    initial_state,
    mask_padding,
    next_round,
    own_state,
    row_arrays,
    substitute,
)
from easylm_mling.data.pool import Pool, check_lanes_with_data, is_pooled, lanes_with_data
from easylm_mling.data.quarantine import Quarantine
from easylm_mling.data.shuffle import open_orders
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.spill_file import SpillFile
from easylm_mling.data.streams import EnteredWindow, LaneStream, StreamState
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import MixingPlan, make_plan, needs_estimates

_BATCHES_AHEAD = 2


class Loader:
    """An iterator of (batch, state after it) for the lanes of one host. Endless unless a source with an end is needed.

    A batch holds the arrays of mixture.row_arrays, [rows, T], and `source`, int32 [rows]. Row r of the *global* batch
    belongs to lane r // (batch_size // V). The state (mixture.DataState) is a copy that counts exactly the batches
    returned so far, whatever was read ahead. From all hosts' states together (mixture.whole_state) the same batches
    follow on any number of hosts.

    If a lane needs a row that no source can give (SourceConfig.when_used_up), the iterator ends before that batch, for
    good, and `ended` says why. Other hosts' iterators may go on, so a trainer must end all of them.

    With `budget_epochs` such a row is padding instead, and batches follow until nothing is left. A host that does not
    have all lanes cannot know that, and its iterator is endless.
    """

    def __init__(
        self,
        config: MixerConfig,
        catalog: Catalog,
        tokenizer: Tokenizer,
        state: DataState | None = None,
        lanes: range | None = None,
        quarantine: str | Path | None = None,
        plan: MixingPlan | None = None,
    ):
        """Start to read ahead from `state`, or from the run's start.

        `lanes`: this host's; all by default. `quarantine`: the file that lists bad records. `plan`: the run's; made
        here by default. Raises ConfigError for a state of other lanes or sources, and for a source that would end the
        run before its first step. Errors in reading are raised by `next`.
        """
        assert list(catalog.sources) == list(config.data.sources), "the catalog is of another config"
        self._config, self._tokenizer = config, tokenizer
        self._lanes = range(config.lanes) if lanes is None else lanes
        if plan is None:
            rates = catalog_rates(estimate(catalog, tokenizer)) if needs_estimates(config) else None
            plan = make_plan(config, catalog, rates)
        self._plan = plan
        self.orders = open_orders(config, catalog, plan)
        self._cache = TokenCache(config.data.token_cache, tokenizer) if config.data.token_cache else None
        # Of pooled sources None until a row of it is due.
        self._pools: dict[int, Pool | None] = {i: None for i, o in enumerate(self.orders) if is_pooled(o.source)}
        self.lanes_with_data = lanes_with_data(config, self.orders)
        check_lanes_with_data(config, self.orders, self.lanes_with_data)
        ends = list(accumulate(len(s.languages) for s in catalog.sources.values()))
        # The rows of DataState.languages that are a source's.
        self._language_rows = [slice(start, end) for start, end in pairwise([0, *ends])]
        shape = (config.lanes, len(self.orders), self._lanes)
        # As the run begins or resumes, but for ROWS and EXTRA, which are counted here; what streams count, they keep.
        self._state = initial_state(*shape, ends[-1]) if state is None else own_state(state, *shape, self._pools)
        self._streams: dict[tuple[int, int], LaneStream] = {}
        self._quarantine = Quarantine(quarantine, list(catalog.sources), state and state.lanes) if quarantine else None
        # For each lane, the sources whose streams have ended, and those that give it no row in place of one of them.
        self._used_up: dict[int, set[int]] = {lane: set(self._pools) for lane in self._lanes}
        self.ended = ""
        self._closed = False
        self._batches = self._make_batches()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="easylm-loader")
        self._ahead = deque(self._thread.submit(next, self._batches) for _ in range(_BATCHES_AHEAD))

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        return self

    def __next__(self) -> tuple[Batch, DataState]:
        """Return the next batch; raises ConfigError, now and at every later call, if the data cannot be read."""
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
        """Stop the background thread, at the latest after the row it is making."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()
        if self._quarantine:
            self._quarantine.close()

    def flush(self):
        """Write the bad records of all batches returned so far to disk; raises OSError if there is no room for them."""
        if self._quarantine:
            self._quarantine.flush()

    def _make_batches(self) -> Generator[tuple[Batch, DataState], None, None]:
        data, own, lanes = self._config.data, self._lanes, self._state.lanes
        per_lane = self._config.batch_size // self._config.lanes
        with contextlib.closing(SpillFile()) as spill_file, contextlib.ExitStack() as stack:
            stack.callback(self._close_pools)
            while not self._is_through():
                tokens = np.empty((len(own), per_lane, data.sequence_length + 1), np.int32)
                sources, real = np.empty((2, len(own), per_lane), np.int32)
                for turn, counts in enumerate(batch_counts(self._plan, lanes[..., ROWS], per_lane)):
                    assigned = next_round(self._plan, data.seed, lanes[..., ROWS], self.lanes_with_data, counts)
                    for lane in range(len(lanes)):
                        if self._closed:
                            return
                        source = self._due(lane, int(assigned[lane]))
                        if source is None and not self._config.budget_epochs:
                            return
                        if lane not in own:
                            # What the other hosts' lanes read of a pooled source is not this host's, but known to it.
                            if source in self._pools:
                                self._pool(source).take(lane, data.sequence_length)
                            continue
                        taken = None if source is None else self._take(spill_file, lane, source)
                        if taken is None and not self._config.budget_epochs:
                            return
                        i = lane - own.start
                        due = int(assigned[lane]) if source is None else source
                        sources[i, turn], row = taken or self._padding(lane, due)
                        tokens[i, turn, : len(row)], real[i, turn] = row, len(row)
                    lanes[np.arange(len(assigned)), assigned, ROWS] += 1
                batch = row_arrays(
                    tokens.reshape(-1, data.sequence_length + 1), self._tokenizer.bos_id, self._tokenizer.eos_id
                )
                mask_padding(batch, real.reshape(-1), self._tokenizer.pad_id)
                yield {**batch, "source": sources.reshape(-1)}, self._consumed()

    def _close_pools(self):
        for pool in self._pools.values():
            if pool:
                pool.close()

    def _consumed(self) -> DataState:
        """Return what has been consumed up to the row that was made last."""
        lanes, languages = self._state.copy()
        for (lane, source), stream in self._streams.items():
            stream.state.write_to(lanes[lane, source])
            languages[self._language_rows[source]] += stream.languages
        for source, pool in self._pools.items():
            if pool:
                pool.write_to(lanes[:, source])
                languages[self._language_rows[source]] += pool.languages
        return DataState(lanes, languages)

    def _due(self, lane: int, assigned: int) -> int | None:
        """Return the source of a row that is `assigned` to a source; None if the run ends here.

        It is another one if that is a pooled source, and used up. All hosts know this of all lanes.
        """
        data, counters = self._config.data, self._state.lanes[lane]
        source: int | None = assigned
        while source in self._pools and self._pool(source).is_used_up(lane):
            if self._stops(source, lane):
                return None
            used_up = {i for i in self._pools if self._pool(i).is_used_up(lane)}
            shares = self._plan.shares_at(int(counters[:, ROWS].sum()))
            source = substitute(shares, data.seed, lane, counters[:, EXTRA], used_up)
        if source is None:
            self.ended = f"every source is used up in lane {lane}"
        elif source != assigned:
            counters[source, EXTRA] += 1
        return source

    def _take(self, spill_file: SpillFile, lane: int, due: int) -> tuple[int, np.ndarray] | None:
        """Return a source and its row for an own lane, of the source that is `due` or, if that has ended there, another.

        None if the run ends here. The other one is no pooled source: where those are is known to all hosts, and the end
        of a stream is not.
        """
        data, counters, used_up = self._config.data, self._state.lanes[lane], self._used_up[lane]
        shares = self._plan.shares_at(int(counters[:, ROWS].sum()))
        if due in self._pools:
            return due, self._pool(due).row(lane, data.sequence_length)
        source: int | None = due
        while source is not None:
            if source not in used_up:
                row = self._row(spill_file, lane, source)
                if len(row):
                    return source, row
                used_up.add(source)
            if self._stops(source, lane):
                return None
            source = substitute(shares, data.seed, lane, self._given_instead(lane), used_up)
        others = " but the small ones" if self._pools else ""
        self.ended = f"every source{others} is used up in lane {lane}"
        return None

    def _padding(self, lane: int, source: int) -> tuple[int, np.ndarray]:
        """Return a row of no token in place of one that was due of a source."""
        length = self._config.data.sequence_length
        if source in self._pools:
            self._pool(source).counters[lane, PADDING] += length
        else:
            self._streams[lane, source].state.padding += length
        return source, np.zeros(0, np.int32)

    def _is_through(self) -> bool:
        """Return True if all of `budget_epochs` has been given. Known only where all lanes are this host's."""
        if not self._config.budget_epochs or len(self._lanes) < self._config.lanes:
            return False
        shares = self._plan.shares_at(int(self._state.lanes[0, :, ROWS].sum()))
        used = {i for i, share in enumerate(shares) if share}
        return all(used <= self._used_up[lane] for lane in self._lanes) and all(
            self._pool(i).is_used_up(lane) for i in used & self._pools.keys() for lane in self._lanes
        )

    def _stops(self, source: int, lane: int) -> bool:
        """Return True, and say so, if the run ends with this source."""
        name = self.orders[source].source.name
        rule = self._config.data.sources[name]
        if rule.when_used_up == "stop":
            self.ended = f"data.sources.{name} is used up (max_epochs={rule.max_epochs}) in lane {lane}"
        return rule.when_used_up == "stop"

    def _given_instead(self, lane: int) -> np.ndarray:
        """Return the rows that each source has given the lane beyond those assigned, int64 [S]."""
        counters = self._consumed_of(lane)
        return (counters[:, TOKENS] + counters[:, PADDING]) // self._config.data.sequence_length - counters[:, ROWS]

    def _consumed_of(self, lane: int) -> np.ndarray:
        counters = self._state.lanes[lane].copy()
        for source in range(len(counters)):
            if stream := self._streams.get((lane, source)):
                stream.state.write_to(counters[source])
        return counters

    def _pool(self, source: int) -> Pool:
        """Return the pool of a small source, which is read now if it was not yet."""
        pool = self._pools[source]
        if pool is None:
            state = self._state.lanes[:, source]

            def account(bad: list[BadRecord], good: int):
                self._account(0, source, EnteredWindow(0, 0, 0, bad, [], good))

            pool = self._pools[source] = Pool(self.orders[source], self._tokenizer, state, self._lanes, account)
        return pool

    def _row(self, spill_file: SpillFile, lane: int, source: int) -> np.ndarray:
        """Return the next row of a lane's stream; it is empty if the stream has ended."""
        if (lane, source) not in self._streams:
            state = StreamState.from_counters(self._state.lanes[lane, source])
            self._streams[lane, source] = LaneStream(
                self.orders[source], self._tokenizer, lane, self._config.lanes, state, spill_file, self._cache
            )
        stream = self._streams[lane, source]
        while (row := stream.take(self._config.data.sequence_length)) is None:
            assert stream.entered is not None
            self._account(lane, source, stream.entered)
        return row

    def _account(self, lane: int, source: int, window: EnteredWindow):
        """Write the bad records of a window to the quarantine."""
        if window.bad and self._quarantine:
            self._quarantine.write(lane, source, window)
