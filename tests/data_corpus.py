"""Small corpora in every layout, and a tokenizer trained the way Gemma's is, for the tests of the mixer."""

import functools
import gzip
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
import zstandard

from easylm_mling.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.shuffle import EpochOrder, epoch_windows
from easylm_mling.data.tokenization.tokenizer import Tokenizer

LAYOUTS = ("jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "parquet", "arrow", "arrow-file")
WORDS = "river stone 日本 は 雨 small вода light 바람 tree ten 7 été night ส้ม walk 😀 house open grey salt".split()


def documents(count: int, seed: int = 0, prefix: str = "d") -> list[str]:
    """Different documents of 1 to 40 words, some with newlines."""
    rng = random.Random(seed)
    return [
        f"{prefix}{i} " + "".join(rng.choice(WORDS) + rng.choice("  \n") for _ in range(rng.randint(1, 40)))
        for i in range(count)
    ]


def write(path: Path, layout: str, texts: list, rows: int = 7, column: str = "text") -> Path:
    """`texts` as one file of this layout, `rows` to a row group or record batch. None becomes a null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_name(f"{path.name}.{'arrow' if layout == 'arrow-file' else layout}")
    lines = "".join(json.dumps({"id": i, column: t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts))
    if layout == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif layout.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif layout.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    else:
        schema = pa.schema([("id", pa.int64()), (column, pa.string())])
        table = pa.table({"id": list(range(len(texts))), column: texts}, schema=schema)
        if layout == "parquet":
            pq.write_table(table, path, row_group_size=rows)
            return path
        new = pa.ipc.new_stream if layout == "arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, schema) as writer:
            for batch in table.to_batches(max_chunksize=rows):
                writer.write_batch(batch)
    return path


def data_config(paths, block_bytes=2000, length=32, tokenizer="", data=None, **settings) -> DataConfig:
    """One source named `s`, or those of `paths` if that is a dict name -> SourceConfig."""
    if not isinstance(paths, dict):
        source = SourceConfig((str(paths),), 1.0, **{"holdout_fraction": 0.0, **settings})
        paths = {"s": source}
    return DataConfig(tokenizer, paths, sequence_length=length, block_bytes=block_bytes, **(data or {}))


def run_config(data: DataConfig, batch_size: int) -> RunConfig:
    model = ModelConfig(vocab_size=1200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, head_dim=8)  # fmt: skip
    return RunConfig("unused", model, data, TrainConfig(budget_tokens=10**9, batch_size=batch_size))


def epoch_order(data: DataConfig, name: str = "s") -> EpochOrder:
    return EpochOrder(build_catalog(data).sources[name], data.seed, data.block_bytes)


def epoch_documents(order: EpochOrder, epoch: int = 0, split: str = "train") -> list[str]:
    return [text.decode() for window in epoch_windows(order, epoch, split) for text in window.documents]


def train_tokenizer(path: Path | str, **options) -> str:
    """A BPE model with byte fallback, trained the way Gemma's is but for `options`."""
    gemma = dict(
        model_type="bpe", vocab_size=600, hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    with open(path, "wb") as file:
        train = sentencepiece.SentencePieceTrainer.train
        train(sentence_iterator=iter(documents(300, seed=1)), model_writer=file, **{**gemma, **options})
    return str(path)


@functools.cache
def tokenizer_path() -> str:
    return train_tokenizer(Path(tempfile.mkdtemp()) / "tokenizer.model")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_path())


def assert_same(got, want):
    """Two lists of (batch, data state) are the same, bit for bit."""
    assert len(got) == len(want)
    for (a, state_a), (b, state_b) in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        for x, y in zip(state_a, state_b, strict=True):
            np.testing.assert_array_equal(x, y)
