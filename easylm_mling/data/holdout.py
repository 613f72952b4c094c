"""The rows that a run validates on."""

from itertools import islice

import numpy as np

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.mixture import Batch, mask_padding, row_arrays
from easylm_mling.data.shuffle import EpochOrder, epoch_windows
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents

_HOLDOUT_WINDOWS = 20_000


def holdout_rows(config: MixerConfig, catalog: Catalog, tokenizer: Tokenizer, source: str, rows: int) -> Batch:
    """Return up to `rows` rows of the source's held-out documents, the same on every host and at any time.

    They are its first documents in the order of epoch 0, sorted by language. The last row may be padded: pad id, and 0
    in the other arrays. `language`, int32 [rows, T], is each token's index into Source.languages. There are no rows if
    the first 20,000 windows hold no such document. Reads about rows * T * 4 / holdout_fraction bytes. Raises ConfigError
    for a damaged file.
    """
    length = config.data.sequence_length
    order = EpochOrder(catalog.sources[source], config.data.seed, config.data.block_bytes)
    documents, languages, total = [], [], 0
    for window in islice(epoch_windows(order, 0, "holdout"), _HOLDOUT_WINDOWS if rows else 0):
        for text, (unit, _) in zip(window.documents, window.provenance.tolist(), strict=True):
            if total <= rows * length:
                documents.append(join_documents(tokenizer, [text.decode()]))
                languages.append(int(order.source.unit_languages[unit]))
                total += len(documents[-1])
        if total > rows * length:
            break
    count = min(rows, -(-total // length))
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    by_language = np.argsort(np.array(languages, np.int64), kind="stable").tolist()
    stream = np.concatenate([np.zeros(0, np.int32), *(documents[i] for i in by_language)])[: count * length + 1]
    lengths = [len(documents[i]) for i in by_language]
    language = np.repeat(np.array(languages, np.int32)[by_language], lengths)[: count * length + 1]
    real = len(stream)
    stream, language = (
        np.pad(x, (0, count * length + 1 - real), constant_values=fill)
        for x, fill in ((stream, tokenizer.pad_id), (language, 0))
    )
    batch = row_arrays(stream[index], tokenizer.bos_id, tokenizer.eos_id)
    mask_padding(batch, real - np.arange(count) * length, tokenizer.pad_id)
    of_source = np.full(count, list(catalog.sources).index(source), np.int32)
    return {**batch, "source": of_source, "language": language[index[:, :length]]}
