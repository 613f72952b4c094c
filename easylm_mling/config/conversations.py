"""Settings of a source whose rows are conversations: how a row is read, written by a template, and trained on."""

import difflib
import re
from dataclasses import dataclass

from easylm_mling.config.basics import setting
from easylm_mling.errors import check

# Format -> what is read of a row -> the column or key it has by default. The first one must be there.
FORMATS: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages", "role": "role", "content": "content", "train": "train"},
    "sharegpt": {"messages": "conversations", "role": "from", "content": "value", "train": "train", "system": "system"},
    "alpaca": {"output": "output", "instruction": "instruction", "input": "input", "system": "system",
               "history": "history"},
    "question": {"response": "response", "question": "question", "system": "system_prompt"},
    "prompt": {"completion": "completion", "prompt": "prompt", "role": "role", "content": "content"},
    "guanaco": {"text": "text"},
}  # fmt: skip
# The keys inside a message, which are no columns.
MESSAGE_KEYS = ("role", "content", "train")
# What data sets call the parts of a conversation; of guanaco, the marks that begin them.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
GUANACO_MARKS = {"### Human:": "user", "### Assistant:": "assistant"}


@dataclass(frozen=True)
class ConversationConfig:
    """How the rows of a source are read as conversations, written by a template, and trained on.

    Only answers are targets. A row without one, or with roles out of order, is a bad record.
    """

    format: str = setting("messages", f"what a row is: {', '.join(FORMATS)} (docs/tuning.md)")
    keys: dict[str, str] = setting(
        factory=dict, help="columns or keys with other names than the format's, as `instruction: question`"
    )
    roles: dict[str, str] = setting(
        factory=dict,
        help="further names of roles, as `bard: assistant`; of guanaco, the marks that begin a turn",
    )
    template: str = setting(
        "tokenizer",
        "how a conversation is written: `tokenizer`, the chat template beside data.tokenizer; a plain form (alpaca, "
        "aog, komt, kullm, gemma); or a .jinja or .yaml file",
        path=True,
    )
    date: str | None = setting(
        None, "the day, as 2024-07-26, that a template which writes today's date writes: the same in every run"
    )
    system: str | None = setting(None, "a system line for conversations without one")
    system_probability: float = setting(
        1.0, "share of those conversations, chosen by a hash of the conversation, that get it"
    )
    system_place: str = setting(
        "prefix",
        "where a template has no place for a system line. prefix: before the first question, with a blank line between. "
        "drop: it is left out",
    )
    train_on: str = setting(
        "all",
        "which answers are targets. all: every one. last: the last one. flagged: those whose message does not say "
        "`train: false` (or 0)",
    )
    train_end: bool = setting(True, "the token that ends an answer is a target, too: a model learns to stop by it")
    too_long: str = setting(
        "truncate",
        "what becomes of a conversation longer than a row. truncate: its end is cut off. drop: it is left out, and "
        "listed in the quarantine without counting as bad",
    )

    def validate(self, key: str):
        """Raise ConfigError that names the first wrong setting below `key`."""
        check(self.format in FORMATS, f"{key}.format={self.format!r} must be one of {', '.join(FORMATS)}")
        known = FORMATS[self.format]
        for name, column in self.keys.items():
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the format {self.format} has: {', '.join(known)}"
            check(name in known, f"unknown key '{key}.keys.{name}'; {hint}")
            check(bool(column), f"{key}.keys.{name} is empty; name a column, or remove it")
        for name, role in self.roles.items():
            roles = sorted(set(ROLES.values()))
            check(role in roles, f"{key}.roles.{name}={role!r} must be one of {', '.join(roles)}")
        check(bool(self.template), f"{key}.template is empty; name one, or remove it for the tokenizer's own")
        check(
            self.date is None or re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])", self.date) is not None,
            f"{key}.date={self.date!r} must be a day such as 2024-07-26",
        )
        check(
            0 <= self.system_probability <= 1,
            f"{key}.system_probability={self.system_probability} must be between 0 and 1",
        )
        for name, allowed in (
            ("system_place", ("prefix", "drop")),
            ("train_on", ("all", "last", "flagged")),
            ("too_long", ("truncate", "drop")),
        ):
            value = getattr(self, name)
            check(value in allowed, f"{key}.{name}={value!r} must be one of {', '.join(allowed)}")

    @property
    def names(self) -> dict[str, str]:
        """What is read of a row -> its column or key."""
        return FORMATS[self.format] | self.keys

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that are read; the first must be there."""
        return tuple(column for name, column in self.names.items() if name not in MESSAGE_KEYS)
