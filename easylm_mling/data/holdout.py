"""The rows that a run validates on."""

from itertools import islice

import numpy as np

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.documents import encode_documents, has_conversations
from easylm_mling.data.mixture import Batch, mask_padding, row_arrays
from easylm_mling.data.packing import whole_rows
from easylm_mling.data.shuffle import EpochOrder, epoch_windows
from easylm_mling.data.tokenization.tokenizer import Tokenizer

_HOLDOUT_WINDOWS = 20_000


def holdout_rows(config: MixerConfig, catalog: Catalog, tokenizer: Tokenizer, source: str, rows: int) -> Batch:
    """Return up to `rows` rows of the source's held-out documents, the same on every host and at any time.

    They are its first documents in the order of epoch 0, sorted by language; conversations are whole. Rows may be padded:
    pad id, and 0 in the other arrays. `language`, int32 [rows, T], is each token's index into Source.languages. There are no rows if
    the first 20,000 windows hold no such document. Reads about rows * T * 4 / holdout_fraction bytes. Raises ConfigError
    for a damaged file.
    """
    length = config.data.sequence_length
    order = EpochOrder(catalog.sources[source], config.data.seed, config.data.block_bytes)
    documents, languages, total = [], [], 0
    for window in islice(epoch_windows(order, 0, "holdout"), _HOLDOUT_WINDOWS if rows else 0):
        for text, (unit, _) in zip(window.documents, window.provenance.tolist(), strict=True):
            if total <= rows * length and len(tokens := encode_documents(order.source, tokenizer, [text]).tokens):
                documents.append(tokens)
                languages.append(int(order.source.unit_languages[unit]))
                total += len(tokens)
        if total > rows * length:
            break
    by_language = np.argsort(np.array(languages, np.int64), kind="stable").tolist()
    lengths = [len(documents[i]) for i in by_language]
    stream = np.concatenate([np.zeros(0, np.int32), *(documents[i] for i in by_language)])
    language = np.repeat(np.array(languages, np.int32)[by_language], lengths)
    if has_conversations(order.source):
        index, real = whole_rows(np.cumsum(lengths, dtype=np.int64), rows, length)
    else:
        count = min(rows, -(-total // length))
        index = np.arange(count)[:, None] * length + np.arange(length + 1)
        real = min(total, count * length + 1) - np.arange(count) * length
    # What an index finds behind the end is masked.
    stream, language = (np.pad(x, (0, length + 1)) for x in (stream, language))
    batch = row_arrays(stream[index], tokenizer.bos_id, tokenizer.eos_id)
    of_language = np.where(np.arange(length) < real[:, None], language[index[:, :length]], 0)
    mask_padding(batch, real, tokenizer.pad_id)
    of_source = np.full(len(real), list(catalog.sources).index(source), np.int32)
    return {**batch, "source": of_source, "language": of_language}
