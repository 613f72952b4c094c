"""Conversations with a model: what its prompt is, in the template that it was trained in, and what ends its answers."""

from collections.abc import Sequence
from pathlib import Path

from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data.conversations.encoding import UNTRAINED, ConversationEncoder
from easylm_mling.data.conversations.messages import Message, document
from easylm_mling.data.conversations.templates import plain_names, read_template
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

_KEY = "--template"


class Dialogue:
    """One template and tokenizer. `end` is the id that ends an answer, and `name` says which template it is."""

    def __init__(self, tokenizer: Tokenizer, config: ConversationConfig, length: int):
        """Raises ConfigError for a template that is missing or of another tokenizer."""
        config.validate(_KEY)
        template = read_template(config, tokenizer.path, _KEY)
        self.name = config.template
        self._encoder = ConversationEncoder(config, template, tokenizer, length, _KEY)
        row = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}
        ids = self._encoder.encode(document(row, ConversationConfig()))
        self.end = int(ids[ids < UNTRAINED][-1])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids, with BOS, that ask for an answer. Raises ValueError with a short reason for roles out of order."""
        turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
        wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
        if [m["role"] for m in turns] != wanted:
            raise ValueError(
                "messages are at most one system line, then user and assistant in turns, and end with the user"
            )
        if empty := next((n for n, m in enumerate(messages, 1) if not m["content"].strip()), 0):
            raise ValueError(f"message {empty} is empty")
        return self._encoder.prompt(list(messages)).tolist()


def open_dialogue(
    path: str | Path, step: int | None, tokenizer: Tokenizer, template: str | None, length: int
) -> Dialogue:
    """Return the dialogue of the model at `path` in `template`; None: that of the conversations that the run trained on, else the tokenizer's.

    Raises ConfigError if there is none.
    """
    config = ConversationConfig(template=template) if template else _trained_in(path, step)
    try:
        return Dialogue(tokenizer, config or ConversationConfig(), length)
    except ConfigError as error:
        if template or config:
            raise
        raise ConfigError(
            f"{path}: neither the model nor its tokenizer says how it is asked ({error}); name its template: {_KEY} "
            f"{' or '.join(plain_names())}, or a .jinja or .yaml file"
        ) from None


def _trained_in(path: str | Path, step: int | None) -> ConversationConfig | None:
    """Return the form of the first conversations that a run was trained on, without the system line that training added."""
    if (Path(path) / "config.json").is_file():
        return None
    sources = load_info(path, step).get("config", {}).get("data", {}).get("sources", {})
    forms = [s["conversations"] for s in sources.values() if s.get("conversations") and s.get("weight") != 0]
    if not forms:
        return None
    return ConversationConfig(**{key: forms[0][key] for key in ("template", "date", "system_place") if key in forms[0]})
