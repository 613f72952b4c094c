"""Scores of a small fixed part of a suite while a run trains: bits a byte of right answers, and centred accuracies."""

from functools import cached_property
from typing import TYPE_CHECKING

import orjson
from jax.sharding import Mesh
from rich.console import Console

from easylm_mling.config import RunConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.distributed.agreement import broadcast_bytes, is_primary
from easylm_mling.errors import check
from easylm_mling.evaluation.scoring.packing import Limits, batches_of
from easylm_mling.evaluation.scoring.scorer import Scorer
from easylm_mling.evaluation.scoring.suites import harness_is_there, load_suite, with_data
from easylm_mling.evaluation.scoring.windows import Window, encode_pair, windows_of
from easylm_mling.monitoring.console import say
from easylm_mling.training.state import model_graph

if TYPE_CHECKING:
    from easylm_mling.evaluation.scoring.items import Item

Pair = tuple[list[int], list[int]]  # ids of a context, with BOS, and of what follows it


class TaskScores:
    """Scores the parameters of a run on `eval.suite`. Only the primary process knows the tasks; all have their tokens."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        """Load the tasks and encode their requests, in the primary process. Raises ConfigError for what cannot be had."""
        self._config = config
        self._items: list[Item] = []
        self._pairs: list[list[Pair]] = []  # of each item
        if not is_primary():
            return
        check(harness_is_there(), "eval.suite: lm-evaluation-harness is missing; run pip install 'easylm-mling[eval]'")
        from easylm_mling.evaluation.scoring.items import fixed_items  # imports lm_eval
        from easylm_mling.evaluation.scoring.tasks import load_rows

        bos = [config.model.bos_token_id]
        suite = with_data(load_suite(config.eval.suite), config.eval.suite_data)
        self._items = fixed_items(load_rows(suite), config.eval.suite_items)
        self._pairs = [[encode_pair(tokenizer, bos, *p) for p in item.pairs] for item in self._items]

    def about(self) -> str:
        """Return one line about what is scored; in the primary process."""
        length = self._config.data.sequence_length
        cut = sum(len(a) + len(b) > length + 1 for pairs in self._pairs for a, b in pairs)
        text = f"eval.suite={self._config.eval.suite}: {len(self._items):,} items are scored while the run trains"
        return text + (f"; {cut:,} of their contexts are longer than a row and are cut on the left" if cut else "")

    @cached_property
    def _windows(self) -> tuple[list[Window], list[tuple[int, int]]]:
        """Windows of all requests, and for each its item and request. Collective, once."""
        pairs = orjson.loads(broadcast_bytes(orjson.dumps(self._pairs)))
        windows, owners = [], []
        for i, of_item in enumerate(pairs):
            for r, (context, continuation) in enumerate(of_item):
                made = windows_of(context, continuation, self._config.data.sequence_length)
                windows += made
                owners += [(i, r)] * len(made)
        return windows, owners

    def __call__(self, params: dict, mesh: Mesh) -> dict:
        """Return the scores of these weights (TrainState's) as items.score_items has them; {} but in the primary process. Collective."""
        config = self._config
        scorer = Scorer(model_graph(config.model), params, config.model, mesh, config.train.compute_dtype, config.lora)
        found: dict[int, tuple[float, bool]] = {}
        limits = Limits(config.data.sequence_length)
        for rows in batches_of(self._windows[0], limits, scorer.shards, scorer.knee):
            found |= scorer.answers(rows)
        if not is_primary():
            return {}
        from easylm_mling.evaluation.scoring.items import score_items

        # An empty answer has no windows: log-likelihood 0, as in the harness.
        answers = [[(0.0, True)] * len(pairs) for pairs in self._pairs]
        for number, (i, r) in enumerate(self._windows[1]):
            (before, greedy), (value, likeliest) = answers[i][r], found[number]
            answers[i][r] = before + value, greedy and likeliest
        return score_items(self._items, answers)


def open_task_scores(config: RunConfig, tokenizer: Tokenizer, console: Console) -> TaskScores | None:
    """Return the scores that the config asks for, or None. Raises ConfigError for tasks that cannot be had."""
    if not config.eval.suite:
        return None
    scores = TaskScores(config, tokenizer)
    if is_primary():
        say(console, scores.about())
    return scores
