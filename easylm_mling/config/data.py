"""Settings of the data: what is read, in which shares, in which order."""

import math
import re
from dataclasses import dataclass

from easylm_mling.config.basics import setting
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.errors import check


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub (or a local folder like one), resolved to its files when a run begins."""

    name: str = setting(help="the data set's name on the hub, or a local folder like one", path=True)
    config: str | None = setting(None, "the configuration to read")
    split: str = setting("train", "the split to read")
    revision: str | None = setting(
        None, "a branch, tag or commit; by default the newest commit, and the run then keeps to it"
    )


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of the mixture.

    A path is a local one, or begins with gs://, s3://, https:// or hf://datasets/. It may name a folder, hold globs,
    and `{language}` in place of one whole folder or file name: every match is then a language of this source
    (`data/glot500/{language}/train/data-*.arrow`). Instead of paths, `dataset` names a data set of the hub.

    In YAML a source may be a group instead: `llama2ko: {weight: 2, sources: {ko: {...}, en: {...}}}` is two sources,
    `llama2ko/ko` and `llama2ko/en`, that divide the group's weight by their own.
    """

    paths: tuple[str, ...] = setting(
        (), "files, folders and globs, local or remote; {language} stands for one whole folder or file name", path=True
    )
    weight: float | None = setting(
        None,
        "share of the tokens, relative to the other sources' weights; left out where data.weighting sets the shares",
    )
    dataset: HubDataset | None = setting(None, "a data set of the Hugging Face hub, instead of paths")
    text_column: str = setting("text", "column or key that holds the text")
    conversations: ConversationConfig | None = setting(
        None, "rows are conversations, of which only the answers are trained on; without it they are texts"
    )
    row: str = setting(
        "document",
        "document: a row is a document. line: a row is a line, and a blank row ends a document; a row of a .txt file is "
        "a line of it",
    )
    holdout_fraction: float = setting(
        0.001,
        "share of the documents, chosen by a hash of their normalised text, that is never trained on but validated on; "
        "the largest share of any source decides what no source is trained on",
    )
    sample_fraction: float = setting(
        1.0, "share of the other documents, chosen by a hash of their text, that is trained on"
    )
    max_epochs: int = setting(
        0, "most times that a document is trained on in the whole run; 0: as often as the budget needs"
    )
    when_used_up: str = setting(
        "repeat",
        "what a lane does when it is due a row of this source and has read its part of max_epochs epochs. repeat: read on "
        "(max_epochs must be 0). redistribute: take the row from its other sources, by their shares. stop: end the run",
    )
    language_by: str = setting(
        "bytes",
        "size of a language that sets its share of an epoch: bytes of text or tokens, estimated, to the power of "
        "language_temperature. unimax: equal shares of what the run takes of this source, but of no language more than "
        "max_epochs epochs (arXiv:2304.09151)",
    )
    language_temperature: float = setting(1.0, "power of a language's size: 1 keeps natural shares, 0 makes all equal")
    language_max_repeats: int = setting(4, "most repeats of a language inside one epoch, whatever the temperature says")

    def validate(self, name: str):
        """Raise ConfigError that names the first wrong setting of the source `name`."""
        key = f"data.sources.{name}"
        check(self.dataset is None or not self.paths, f"{key}: has both paths and a dataset; keep one of them")
        check(bool(self.paths or self.dataset), f"{key}.paths is empty; name at least one file or glob")
        check(
            self.weight is None or (math.isfinite(self.weight) and self.weight >= 0),
            f"{key}.weight={self.weight} must be a finite number, zero or more",
        )
        check(self.row in ("document", "line"), f"{key}.row={self.row!r} must be 'document' or 'line'")
        if self.conversations:
            check(self.row == "document", f"{key}.row={self.row!r} does not go with conversations; remove it")
            self.conversations.validate(f"{key}.conversations")
        check(0 <= self.holdout_fraction < 1, f"{key}.holdout_fraction={self.holdout_fraction} must be in [0, 1)")
        check(0 < self.sample_fraction <= 1, f"{key}.sample_fraction={self.sample_fraction} must be in (0, 1]")
        check(self.max_epochs >= 0, f"{key}.max_epochs={self.max_epochs} must be zero (no limit) or more")
        rules = ("repeat", "stop", "redistribute")
        check(self.when_used_up in rules, f"{key}.when_used_up={self.when_used_up!r} must be one of {', '.join(rules)}")
        check(
            (self.max_epochs > 0) == (self.when_used_up != "repeat"),
            f"{key}: max_epochs={self.max_epochs} does not go with when_used_up={self.when_used_up}; "
            "'repeat' has no limit (max_epochs 0), 'stop' and 'redistribute' need one (max_epochs 1 or more)",
        )
        measures = ("bytes", "tokens", "unimax")
        check(
            self.language_by in measures, f"{key}.language_by={self.language_by!r} must be one of {', '.join(measures)}"
        )
        check(
            self.language_by != "unimax" or self.max_epochs > 0,
            f"{key}.language_by=unimax needs {key}.max_epochs, the most epochs of a language",
        )
        check(
            0 <= self.language_temperature <= 1,
            f"{key}.language_temperature={self.language_temperature} must be between 0 and 1",
        )
        check(self.language_max_repeats >= 1, f"{key}.language_max_repeats must be at least 1")


@dataclass(frozen=True)
class WeightingConfig:
    """Where the sources' shares come from: their own numbers, or their sizes."""

    by: str = setting(
        "number",
        "number: each source's weight. bytes (of text) or tokens, estimated by a sample: as large as the sources are. temperature: "
        "tokens to the power of temperature. unimax: equal shares, but of no source more than max_epochs epochs of its "
        "estimated tokens under the budget (arXiv:2304.09151; the exact limit is each source's own max_epochs)",
    )
    temperature: float = setting(0.7, "power of a source's tokens, with by: temperature")
    max_epochs: int = setting(4, "most epochs of a source, with by: unimax")

    def __post_init__(self):
        ways = ("number", "bytes", "tokens", "temperature", "unimax")
        check(self.by in ways, f"data.weighting.by={self.by!r} must be one of {', '.join(ways)}")
        check(0 <= self.temperature <= 1, f"data.weighting.temperature={self.temperature} must be between 0 and 1")
        check(self.max_epochs >= 1, f"data.weighting.max_epochs={self.max_epochs} must be at least 1")


@dataclass(frozen=True)
class StageConfig:
    """Other weights from some point of the run on."""

    from_tokens: int = setting(
        help="the stage begins with the first round of rows at this many tokens into the run, or later", unit="tokens"
    )
    weights: dict[str, float] = setting(help="new weights by source; a source that is not named keeps its own weight")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order."""

    tokenizer: str = setting(
        help="the model's tokenizer: a tokenizer.json, a tokenizer.model, or their folder", data=True, path=True
    )
    sources: dict[str, SourceConfig] = setting(help="corpora of the mixture, by name", data=True)
    weighting: WeightingConfig = setting(WeightingConfig(), "where the sources' shares come from", data=True)
    stages: tuple[StageConfig, ...] = setting(
        (), "other weights from a token count on; only stages that have not begun may change", free=True
    )
    sequence_length: int = setting(8192, "length of a row", unit="tokens")
    block_bytes: int = setting(
        4_000_000,
        "about how much text is read, shuffled and tokenised at a time; it bounds memory and the cost of a resume",
        unit="bytes",
    )
    seed: int = setting(0, "seed of the order of documents")
    lanes: int = setting(
        0,
        "independent streams that rows are dealt to; 0: as many as train.batch_size",
        reason="every lane reads its own blocks",
    )
    token_cache: str | None = setting(
        None,
        "folder of tokenised windows that `data tokenize` fills; what is not in it is tokenised when it is due, to the "
        "same bits",
        free=True,
        path=True,
    )
    max_bad_fraction: float = setting(
        0.01, "largest share of bad records among those read; above it, after the first 1000, the run stops", free=True
    )
    retries: int = setting(5, "how often a failed read is tried again", free=True)
    retry_seconds: float = setting(1.0, "wait before the first retry; it doubles with each", unit="seconds", free=True)

    def __post_init__(self):
        check(
            8 <= self.sequence_length <= 1 << 24,
            f"data.sequence_length={self.sequence_length} must be between 8 and {1 << 24}",
        )
        check(self.block_bytes >= 1000, f"data.block_bytes={self.block_bytes} must be at least 1000")
        check(bool(self.sources), "data.sources is empty; name at least one source")
        check(self.lanes >= 0, f"data.lanes={self.lanes} must be zero or more")
        check(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must be in [0, 1]")
        check(self.retries >= 0, f"data.retries={self.retries} must be zero or more")
        check(0 <= self.retry_seconds <= 600, f"data.retry_seconds={self.retry_seconds} must be between 0 and 600")
        for name, source in self.sources.items():
            check(
                re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name) is not None,
                f"data.sources: the name {name!r} may only hold letters, digits, '_', '-' and, but for its beginning, '.'",
            )
            source.validate(name)
            self._check_weight(name, source.weight)
        check(
            any(s.weight != 0 for s in self.sources.values()),
            "data.sources: every weight is 0; give one a positive weight",
        )
        self._check_stages()

    def _check_weight(self, name: str, weight: float | None):
        key, by = f"data.sources.{name}.weight", self.weighting.by
        if by == "number":
            check(weight is not None, f"{key} is missing; add it, or choose another data.weighting.by than 'number'")
        else:
            check(
                weight in (None, 0), f"{key}={weight} means nothing with data.weighting.by={by}; remove it, or write 0"
            )

    def _check_stages(self):
        check(
            not self.stages or self.weighting.by == "number",
            f"data.stages goes with data.weighting.by=number, not with {self.weighting.by!r}; remove one of them",
        )
        starts = [stage.from_tokens for stage in self.stages]
        check(
            all(a < b for a, b in zip([-1, *starts], starts, strict=False)),
            f"data.stages: from_tokens must rise from stage to stage, and is {starts}",
        )
        for i, stage in enumerate(self.stages):
            for name, weight in stage.weights.items():
                key = f"data.stages[{i}].weights.{name}"
                check(name in self.sources, f"{key}: no such source; there are {', '.join(self.sources)}")
                check(math.isfinite(weight) and weight >= 0, f"{key}={weight} must be a finite number, zero or more")
            check(
                sum(self.stage_weights(stage)) > 0, f"data.stages[{i}]: every weight is 0; give one a positive weight"
            )

    def check_epochs(self, epochs: int):
        """Raise ConfigError unless every source that is used is read `epochs` times, 0: as often as a budget needs."""
        if not epochs:
            return
        check(
            self.weighting.by in ("tokens", "bytes"),
            f"train.budget_epochs={epochs} reads every source as often as the others, and data.weighting.by={self.weighting.by} "
            "does not; say data.weighting.by=tokens, without weights",
        )
        for name, source in self.sources.items():
            check(
                source.weight == 0 or (source.max_epochs, source.when_used_up) == (epochs, "redistribute"),
                f"data.sources.{name}: train.budget_epochs={epochs} says how often it is read; remove max_epochs and when_used_up",
            )

    def stage_weights(self, stage: StageConfig) -> list[float]:
        """Return each source's weight during `stage`."""
        return [stage.weights.get(name, s.weight or 0.0) for name, s in self.sources.items()]
