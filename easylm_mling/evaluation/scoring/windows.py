"""Windows: the token sequences that a request for a log-likelihood becomes, none longer than the model can read.

Source: lm-evaluation-harness 0.4.13 (`models/huggingface.py` and `utils.get_rolling_token_windows`); a window here is what
the model reads there for the same request.
"""

from typing import NamedTuple

import numpy as np

from easylm_mling.data.tokenization.tokenizer import Tokenizer


class Window(NamedTuple):
    """One sequence for the model: `targets` are the tokens after the last `len(targets)` of `inputs`.

    `inputs` are the bytes of int32 ids: they can be compared and hashed, and take a tenth of a tuple's memory.
    """

    inputs: bytes
    targets: tuple[int, ...]


def windows_of(context: list[int], continuation: list[int], length: int) -> list[Window]:
    """Return the windows, of at most `length` inputs, that predict each token of `continuation` once.

    `context` has at least one token, and each window sees as much before its targets as there is room for. An empty
    continuation has no windows.
    """
    assert context and length > 0
    tokens, windows = np.array([*context, *continuation], np.int32), []
    for start in range(len(context), len(tokens), length):
        end = min(start + length, len(tokens))
        windows.append(Window(tokens[max(0, end - 1 - length) : end - 1].tobytes(), tuple(tokens[start:end].tolist())))
    return windows


def encode_pair(tokenizer: Tokenizer, bos: list[int], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context, with `bos` before it, and of its continuation.

    White space at the end of the context is encoded with the continuation, as most vocabularies have pieces that begin with
    a space and none that end with one. The whole is encoded at once and cut where the context's own ids end. Where the
    two texts melt into one piece there, the cut is before that piece.
    """
    kept = context.rstrip()
    whole, alone = (ids.tolist() for ids in tokenizer.encode([kept + context[len(kept) :] + continuation, kept]))
    cut = len(alone)
    if continuation and cut >= len(whole):
        cut = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(whole))
    # Without BOS, a model that has none needs something to read before the first token.
    if not bos and not cut:
        bos = [tokenizer.eos_id]
    return [*bos, *whole[:cut]], whole[cut:]
