"""Texts for many prompts: each row of a decoder takes the next prompt as soon as its text has ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flax import nnx

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.decoder import Decoder, Draw
from easylm_mling.inference.text_stream import TextStream


@dataclass(frozen=True)
class Prompt:
    """A text that is asked for: ids with their BOS, how it is drawn, and where it ends."""

    ids: tuple[int, ...]
    max_new_tokens: int
    draw: Draw = Draw()
    stops: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The most tokens of the text with its prompt."""
        return len(self.ids) + self.max_new_tokens


class Text(NamedTuple):
    """What the model wrote, without its stop string, and why it ended: "stop", or "length"."""

    text: str
    finish: str


def write_texts(
    graph: nnx.GraphDef,
    params: dict,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rows: int = 16,
    dtype: str = "bfloat16",
) -> Iterator[tuple[int, Text]]:
    """Yield the number of each prompt and its text, in the order in which they end. At most `rows` are written at once.

    A text depends on its own prompt only. Raises ConfigError for a prompt that is empty or passes the model's window.
    Collective.
    """
    if not prompts:
        return
    ends = frozenset((model.eos_token_id, *model.stop_token_ids))
    # The cache is as long as the longest text, in few sizes, as each is compiled.
    longest = max(prompt.length for prompt in prompts)
    length = min(1 << (longest - 1).bit_length(), model.max_position_embeddings)
    decoder = Decoder(graph, params, model, min(rows, len(prompts)), max(2, length, longest), dtype)
    waiting, writing = iter(enumerate(prompts)), {}
    for row in range(decoder.rows):
        _begin(decoder, row, waiting, writing, tokenizer, ends)
    while writing:
        tokens = decoder.advance().ids
        for row, (number, stream) in list(writing.items()):
            finish = _add(stream, tokens[row].tolist(), prompts[number].max_new_tokens)
            if finish:
                yield number, Text(stream.close(), finish)
                del writing[row]
                _begin(decoder, row, waiting, writing, tokenizer, ends)


def _begin(decoder: Decoder, row: int, waiting: Iterator, writing: dict, tokenizer: Tokenizer, ends: frozenset[int]):
    """Give the next prompt, if there is one, to a row that is free."""
    for number, prompt in waiting:
        decoder.begin(row, list(prompt.ids), prompt.draw)
        writing[row] = number, TextStream(tokenizer, ends, prompt.stops)
        return


def _add(stream: TextStream, tokens: list[int], most: int) -> str:
    """Add the tokens that a row gained, and return why its text ends with them, or ""."""
    for token in tokens:
        stream.add(token)
        if stream.ended:
            return stream.ended
        if len(stream.ids) == most:
            return "length"
    return ""
