"""Raw text to batches: our loader beside Hugging Face datasets and Grain; same files, same tokenizer, one machine.

    python benchmarks/data.py [TOKENIZER.model] [--megabytes 200] [--million-tokens 40]
                                            (needs grain and datasets: pip install 'easylm-mling[benchmark]')

The text does not repeat itself: its documents are as long as those of data/sample, and made of the words there, each
as frequent as there and drawn at random with a fixed seed. With TEXT=FOLDER in the environment it is the text of that
folder instead, one source for each folder in it, as it is. Either is written to parquet files, weighted by size.

Each contestant is a process of its own that lists its files, loads the tokenizer and makes rows of 8192 tokens. A rate
is tokens over CPU seconds of the process and its children from the first batch on, so it is a rate a core. All encode
with SentencePiece, a text at a time. `SentencePiece alone` is the limit: nothing but the encoder, on texts in memory.

The others do as their documentation says: a shuffled mixture of the sources by weight, each document tokenised and
packed into rows. Neither counts what was read of a source, nor goes on with another number of hosts; that is not measured.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from easylm_mling.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader, open_orders
from easylm_mling.data.shuffle import EpochOrder, epoch_windows
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.data.tools.pretokenize import blocks
from easylm_mling.data.weights import make_plan

SAMPLE = Path(__file__).parents[1] / "data/sample"
LENGTH = 8192
LANES = 16  # of one host: 256 lanes on 16 hosts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", default=str(SAMPLE / "tokenizer/tokenizer.model"))
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--million-tokens", type=float, default=40)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # a contestant, and the folder of parquet files
    a = parser.parse_args()
    if a.only:
        name, folder = a.only
        print(json.dumps(measure(CONTESTANTS[name](config_of(Path(folder), a.tokenizer)), a.million_tokens * 1e6)))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        size = write_corpora(Path(folder), a.megabytes * 1e6)
        print(
            f"{size / 1e6:.0f} MB of {os.environ.get('TEXT', 'made-up text')}, rows of {LENGTH} tokens, {LANES} lanes"
        )
        print(f"{'':28}{'Mtokens/core-s':>15}{'of ours':>9}{'first batch s':>15}{'peak GB':>9}")
        ours = 0.0
        for name in CONTESTANTS:
            command = [sys.executable, __file__, a.tokenizer, "--only", name, folder]
            tokens = a.million_tokens * (0.1 if name in SLOW else 1)
            done = subprocess.run([*command, "--million-tokens", str(tokens)], capture_output=True, text=True)
            if done.returncode:
                print(f"{name:28}failed: {done.stderr.strip().splitlines()[-1][:100]}")
                continue
            m = json.loads(done.stdout.splitlines()[-1])
            ours = ours or m["rate"]
            figures = f"{m['rate'] / 1e6:>15.2f}{m['rate'] / ours:>9.2f}{m['first']:>15.2f}{m['peak'] / 1e9:>9.2f}"
            print(f"{name:28}{figures}", flush=True)


def write_corpora(folder: Path, wanted: float) -> int:
    """Write one parquet file of 20 MB or less after another into FOLDER/SOURCE; returns the bytes of text."""
    real, total = os.environ.get("TEXT"), 0
    sources = {f.name: f for f in sorted(Path(real or SAMPLE).iterdir()) if f.is_dir() and f.name != "tokenizer"}
    for number, (name, source) in enumerate(sources.items()):
        texts = texts_of(source)
        (folder / name).mkdir()
        part, size, written = [], 0, 0
        for text in texts if real else made_up(texts, wanted / len(sources), number):
            part.append(text)
            size += len(text.encode())
            if size > 20e6:
                write_part(folder / name, part)
                part, size, written = [], 0, written + size
        write_part(folder / name, part)
        total += written + size
    return total


def write_part(folder: Path, texts: list[str]):
    path = folder / f"{len(list(folder.iterdir())):03}.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)


def texts_of(folder: Path) -> list[str]:
    """All documents below a folder, by our own readers."""
    data = DataConfig("", {"s": SourceConfig((str(folder),), 1.0, holdout_fraction=0.0)})
    order = EpochOrder(build_catalog(data).sources["s"], 0, data.block_bytes)
    return [text.decode() for window in epoch_windows(order, 0, "train") for text in window.documents]


def made_up(texts: list[str], size: float, seed: int):
    """Yield documents of about `size` bytes in all: words of `texts` by their frequency, lengths of `texts`."""
    # Scripts without spaces have no words to be told apart by a pattern: runs of up to 6 characters stand for them.
    split = [re.findall(r"\s*\w{1,6}|\s*\W", text) for text in texts]
    words, lengths = np.array([w for words in split for w in words]), np.array([len(words) for words in split])
    rng, made = np.random.default_rng(seed), 0
    while made < size:
        text = "".join(rng.choice(words, rng.choice(lengths)).tolist())
        made += len(text.encode())
        yield text


def config_of(folder: Path, tokenizer: str) -> RunConfig:
    sources = {
        f.name: SourceConfig((str(f / "*.parquet"),), float(sum(p.stat().st_size for p in f.iterdir())))
        for f in sorted(folder.iterdir())
        if f.name != "tokens"
    }
    model = ModelConfig(
        vocab_size=1 << 18, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    # Smaller blocks than the default, so that every source has more blocks than lanes, as a real corpus has.
    data = DataConfig(tokenizer, sources, sequence_length=LENGTH, lanes=LANES, block_bytes=1_000_000)
    return RunConfig("unused", model, data, TrainConfig(budget_tokens=10**12, batch_size=LANES))


def measure(sizes, tokens: float) -> dict:
    """Take sizes of batches until there are `tokens`."""
    began = time.monotonic()
    seen, first = next(sizes), time.monotonic() - began
    seen, cpu = 0, cpu_seconds()
    for size in sizes:
        seen += size
        if seen >= tokens:
            break
    return {
        "rate": seen / (cpu_seconds() - cpu),
        "first": first,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def ours(config: RunConfig):
    with Loader(config.mixer, build_catalog(config.data), Tokenizer(config.data.tokenizer)) as loader:
        for batch, _ in loader:
            yield batch["tokens"].size


def ours_cached(config: RunConfig):
    """From the token cache, filled with an epoch before anything is measured."""
    folder = str(Path(next(iter(config.data.sources.values())).paths[0]).parents[1] / "tokens")
    data = replace(config.data, token_cache=folder)
    config = replace(config, data=data)
    catalog, cache = build_catalog(data), TokenCache(folder, Tokenizer(data.tokenizer))
    plan = make_plan(config.mixer, catalog, None)
    orders = open_orders(config.mixer, catalog, plan)
    for source, epoch, block in blocks(config.mixer, catalog, plan, 1):
        cache.fill(orders[source], epoch, block)
    return ours(config)


def load(source: SourceConfig, **options):
    from datasets import load_dataset

    files = sorted(map(str, Path(source.paths[0]).parent.glob("*.parquet")))
    return load_dataset("parquet", data_files=files, split="train", **options)


def hugging_face(config: RunConfig):
    """load_dataset(streaming=True), shuffle with a buffer, interleave by probabilities, tokenise in batches, pack."""
    from datasets import interleave_datasets

    tokenizer, held = Tokenizer(config.data.tokenizer), np.zeros(0, np.int32)
    sources = config.data.sources.values()
    parts = [load(s, streaming=True).shuffle(seed=0, buffer_size=1000) for s in sources]
    weights = np.array([s.weight for s in sources])
    mixed = interleave_datasets(
        parts, probabilities=(weights / weights.sum()).tolist(), seed=0, stopping_strategy="all_exhausted"
    )
    for batch in mixed.iter(batch_size=64):
        held = np.concatenate([held, join_documents(tokenizer, batch["text"])])
        if rows := len(held) // LENGTH:
            packed, held = held[: rows * LENGTH].reshape(-1, LENGTH), held[rows * LENGTH :]
            yield packed.size


def grain(config: RunConfig):
    """MapDataset of each source, shuffled, repeated, mixed by weights, tokenised, concatenated and split into rows."""
    import grain
    from grain.experimental import ConcatThenSplitIterDataset

    tokenizer = Tokenizer(config.data.tokenizer)
    sources = config.data.sources.values()
    with tempfile.TemporaryDirectory(prefix="benchmark_arrow_") as cache:
        # Random access to the texts, as Grain wants it, through the Arrow files that datasets makes of them.
        texts = [load(s, cache_dir=cache) for s in sources]
        parts = [grain.MapDataset.source(part).seed(0).shuffle().repeat() for part in texts]
        mixed = grain.MapDataset.mix(parts, [s.weight for s in sources])
        tokens = mixed.map(lambda row: {"tokens": join_documents(tokenizer, [row["text"]])})
        for row in ConcatThenSplitIterDataset(tokens.to_iter_dataset(), length_struct={"tokens": LENGTH}):
            yield int(np.count_nonzero(row["tokens"]))


def encoder_alone(config: RunConfig):
    tokenizer = Tokenizer(config.data.tokenizer)
    folders = [Path(s.paths[0]).parent for s in config.data.sources.values()]
    texts = [t for f in folders for t in pq.read_table(f / "000.parquet")["text"].to_pylist()]
    np.random.default_rng(0).shuffle(texts)
    return (sum(map(len, tokenizer.encode(texts[i : i + 64]))) for i in range(0, len(texts), 64))


CONTESTANTS = {
    "ours, raw text": ours,
    "ours, token cache": ours_cached,
    "Hugging Face datasets": hugging_face,
    "Grain": grain,
    "SentencePiece alone": encoder_alone,
}
SLOW = ("Hugging Face datasets", "Grain")  # they make a tenth of the tokens: their rate does not change


if __name__ == "__main__":
    main()
