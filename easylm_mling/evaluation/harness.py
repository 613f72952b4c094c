"""The adapter to lm-evaluation-harness: its requests, answered by a sharded model of ours in this process."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check
from easylm_mling.evaluation.chat import ChatForm
from easylm_mling.evaluation.generation import Task, Writer, batches_of_tasks
from easylm_mling.evaluation.request_cache import RequestCache, request_key
from easylm_mling.evaluation.scoring.packing import Limits, Row, batches_of
from easylm_mling.evaluation.scoring.scorer import Scorer
from easylm_mling.evaluation.scoring.windows import Window, encode_pair, windows_of

_MAX_NEW_TOKENS = 256  # the harness's own default
_GENERATION_SETTINGS = {"do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p"}


# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


class HarnessModel(TemplateLM):
    """A model as the harness sees one. Each text begins with exactly one BOS, if the model has one."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        cache: RequestCache,
        limits: Limits,
        progress: Progress = lambda what, done, of: None,
        writer: Writer | None = None,
        chat: ChatForm | None = None,
    ):
        super().__init__()
        self.scorer, self.own_tokenizer, self.cache, self.limits, self.progress = (
            scorer, tokenizer, cache, limits, progress
        )  # fmt: skip
        self._writer = writer or Writer(scorer.graph, scorer.params, scorer.model, tokenizer, scorer.dtype)
        self._chat = chat
        bos = scorer.model.bos_token_id
        self.bos = [bos] if bos >= 0 else []
        # What the user is told at the end: requests of each kind, cut contexts, model calls, tokens read and slots for them.
        self.counts: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.scorer.model.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id before every text: BOS, and EOS for a model that has none."""
        return self.bos[0] if self.bos else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Return the ids of a text, after one BOS unless `add_special_tokens` is false."""
        return [*([] if add_special_tokens is False else self.bos), *self.own_tokenizer.encode([string])[0].tolist()]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return what stands for the messages in the texts of the harness."""
        assert self._chat is not None
        return self._chat.text(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """No name: the harness's own cache of requests, which it would be a key of, is not used."""
        return ""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt = self._chat.ids(context) if self._chat else None
        if prompt is not None:
            # Cut where the turn's header ends, also if that is white space: an answer is trained on by itself.
            return prompt, self.own_tokenizer.encode([continuation])[0].tolist()
        return encode_pair(self.own_tokenizer, self.bos, context, continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding would write it) of each (context, continuation).

        An empty continuation has log-likelihood 0 and is greedy. A context that is too long is cut on the left.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        self.counts["log-likelihoods"] += len(pairs)
        self.counts["empty continuations"] += sum(not continuation for _, continuation in pairs)
        self.counts["contexts cut"] += sum(len(a) + len(b) > self.limits.length + 1 for a, b in pairs)
        return self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        windows, owners = [], []
        for number, (_, context, continuation) in enumerate(requests):
            made = windows_of(context, continuation, self.limits.length)
            windows += made
            owners += [number] * len(made)
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        for owner, (likelihood, likeliest) in zip(owners, self._score(windows), strict=True):
            sums[owner] += likelihood
            greedy[owner] &= likeliest
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text; each of its tokens is predicted once."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        self.counts["rolling log-likelihoods"] += len(texts)
        answers = self._loglikelihood_tokens([(("", ""), [self.prefix_token_id], ids) for ids in texts])
        return [likelihood for likelihood, _ in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each context, up to the first of its stop strings.

        A context that leaves no room for the new tokens is cut on the left.
        """
        tasks = [self._task(*request.args) for request in requests]
        repeats: Counter[Task] = Counter()
        for n, task in enumerate(tasks):
            # A text that is drawn several times is drawn with other keys.
            tasks[n] = replace(task, seed=repeats[task] if task.temperature else 0)
            repeats[task] += 1
        self.counts["generations"] += len(tasks)
        keys = [request_key("generate", list(t.prompt), {**t.settings, "stops": t.stops}) for t in tasks]
        todo = {key: task for key, task in zip(keys, tasks, strict=True)}
        order, done = list(todo), 0
        for numbers in batches_of_tasks(list(todo.values()), self.limits.rows):
            new = [order[n] for n in numbers if order[n] not in self.cache]
            if new:
                self.counts["model calls"] += 1
                texts = self._writer.write([todo[key] for key in new])
                self.cache.add(dict(zip(new, texts, strict=True)))
            done += len(numbers)
            self.progress("texts", done, len(order))
        return [self.cache[key] for key in keys]

    def _task(self, context: str, settings: dict) -> Task:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        unknown = given.keys() - _GENERATION_SETTINGS
        check(not unknown, f"generation_kwargs of a task: {', '.join(sorted(unknown))} cannot be had; leave it out")
        stops = handle_stop_sequences(given["until"], eos=self.own_tokenizer.piece(self.own_tokenizer.eos_id))
        room = self.limits.length - given["max_gen_toks"]
        check(
            room > 0,
            f"a task asks for {given['max_gen_toks']} new tokens, and the window has {self.limits.length}; set a smaller "
            "max_gen_toks in the task, or a larger --max-length",
        )
        prompt = self._chat.ids(context) if self._chat else None
        ids = self.tok_encode(context) if prompt is None else prompt
        if len(ids) > room:
            self.counts["contexts cut"] += 1
            ids = ids[-room:]
        temperature = float(given.get("temperature") or 0.0) if given["do_sample"] else 0.0
        return Task(tuple(ids) or (self.prefix_token_id,), tuple(stops), given["max_gen_toks"], temperature,
                    given.get("top_k") or None, float(given.get("top_p") or 1.0))  # fmt: skip

    def _score(self, windows: list[Window]) -> list[tuple[float, bool]]:
        """Return the answer of each window: from the cache, or from the model in a packed batch.

        Batches are made of all windows, cached or not, so that after a kill the rest is computed in the same batches, to the
        same bits.
        """
        keys = [request_key("loglikelihood", w.inputs, list(w.targets)) for w in windows]
        names = list(unique := dict(zip(keys, windows, strict=True)))
        done, shards, knee = 0, self.scorer.shards, self.scorer.knee
        for batch_rows in batches_of(list(unique.values()), self.limits, shards, knee):
            numbers = {n for row in batch_rows for tree in row.trees for b in tree.branches for n in b.windows}
            missing = {n for n in numbers if names[n] not in self.cache}
            if missing:
                for row in batch_rows:
                    row.trees = [kept for tree in row.trees if (kept := tree.only(missing)).branches]
                self._compute(batch_rows, names)
            done += len(numbers)
            self.progress("log-likelihoods", done, len(names))
        return [(value, bool(greedy)) for value, greedy in (self.cache[key] for key in keys)]

    def _compute(self, rows: list[Row], keys: list[str]):
        answers = self.scorer.answers(rows)
        self.counts["model calls"] += 1
        self.counts["tokens"] += sum(row.size for row in rows)
        self.counts["slots"] += sum(row.width for row in rows)
        if any(value != value for value, _ in answers.values()):
            raise ConfigError("a log-likelihood is not a number: the model is damaged, or needs --dtype float32")
        self.cache.add({keys[window]: answer for window, answer in answers.items()})
