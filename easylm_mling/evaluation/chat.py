"""The chat form: prompts of the harness as turns of a conversation, with the ids that conversations are trained with.

The harness passes texts about. So its messages travel as JSON behind a mark, and become ids where they are read: control
tokens are the template's own, BOS stands once, and a continuation is tokenised by itself, as an answer is in training.
"""

import json

import numpy as np

from easylm_mling.config import ConversationConfig
from easylm_mling.data.conversations.encoding import ConversationEncoder
from easylm_mling.data.conversations.templates import read_template
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

_MARK = "\0messages:"
_DAY = "2024-07-26"  # for templates that write today's date: scores must not depend on it


class ChatForm:
    """Writes prompts by a template: `tokenizer` for the tokenizer's own, or a plain form or file as in docs/tuning.md."""

    def __init__(self, tokenizer: Tokenizer, template: str = "tokenizer"):
        """Read the template. Raises ConfigError for one that is not there, or does not fit the tokenizer."""
        config = ConversationConfig(template=template, date=_DAY)
        read = read_template(config, str(tokenizer.path), "chat form")
        self.template = template
        self._tokenizer = tokenizer
        self._encoder = ConversationEncoder(config, read, tokenizer, 1 << 30, "chat form")

    def text(self, messages: list[dict[str, str]]) -> str:
        """Return the text that stands for these messages until `ids` reads it."""
        return _MARK + json.dumps(messages, ensure_ascii=False)

    def ids(self, context: str) -> list[int] | None:
        """Return the ids, BOS first, that ask a model to go on after a context; None for a context without messages.

        What a last message of the assistant holds is the beginning of the answer. Raises ConfigError for messages that the
        template cannot write.
        """
        if not context.startswith(_MARK):
            return None
        messages, begun = json.loads(context[len(_MARK) :]), ""
        if messages[-1]["role"] == "assistant":
            begun = messages.pop()["content"]
        try:
            prompt = self._encoder.prompt(messages)
        except ValueError as error:
            raise ConfigError(
                f"chat form: a prompt cannot be written by the template: {error}; use --form plain"
            ) from None
        return np.concatenate([prompt, *self._tokenizer.encode([begun] if begun else [])]).tolist()
