"""Raw text to batches: ours beside Grain, Hugging Face datasets and a numpy memmap; same files, same tokenizer, one run.

    python benchmarks/data.py CONFIG.yaml [key=value ...] --megabytes 500 --million-tokens 100
                                            (needs grain and datasets: pip install 'easylm-mling[benchmark]')

The files of CONFIG's sources are repeated into a temporary folder up to `--megabytes`, and weighted by their bytes, so
that none is read for a second time before the others. Each contestant is a process of its own that lists its files,
loads the tokenizer and then makes rows of data.sequence_length until it has `--million-tokens` (the two other libraries
a tenth of that: they take long, and their rate does not change). Its rate is tokens over the CPU seconds of its process
and children from the first batch asked for on, so it is a rate a core, whatever else the machine does. Repeated text
flatters what remembers it (data/encoder.py); `kitoken alone` is the encoder beneath, on some of the same texts.

The others are used as their documentation says: a shuffled, weighted mixture of the same sources, each document
tokenised (by kitoken, as ours) and packed into rows. None of them counts tokens of a source, cuts documents exactly, or
resumes on another number of hosts; that is not what is measured here.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np

from easylm_mling import config as c
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader, open_orders
from easylm_mling.data.shuffle import windows
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.tools.pretokenize import blocks
from easylm_mling.data.weights import make_plan

LANES = 16  # of one host: 256 lanes on 16 hosts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+")
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--million-tokens", type=float, default=100)
    parser.add_argument("--only", choices=[*CONTESTANTS, RESUME, FILL], help=argparse.SUPPRESS)
    a = parser.parse_args()
    files = [x for x in a.config if Path(x).is_file()]
    config = c.load(files, [x for x in a.config if x not in files])
    if a.only in (RESUME, FILL):
        print(json.dumps({RESUME: resume_of_many_lanes, FILL: fill}[a.only](config)))
        return
    if a.only:
        print(json.dumps(measure(CONTESTANTS[a.only], config, a.million_tokens * 1e6)))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        text_bytes = repeat(config, Path(folder), a.megabytes * 1e6)
        tree = c.to_tree(config)
        for name, source in tree["data"]["sources"].items():
            source["paths"] = [str(Path(folder) / name / p) for p in relative(source["paths"])]
            source["weight"] = float(sum(f.stat().st_size for f in (Path(folder) / name).rglob("*") if f.is_file()))
        tree["data"] |= {"lanes": LANES, "token_cache": str(Path(folder) / "tokens")}
        tree["train"] |= {"batch_size": LANES, "budget_tokens": 10**12, "accumulation_steps": 1}
        repeated = Path(folder) / "config.yaml"
        repeated.write_text(json.dumps(tree))
        print(f"{text_bytes / 1e6:.0f} MB of files, rows of {config.data.sequence_length} tokens, {LANES} lanes")
        print(f"{'':34}{'Mtokens/core-s':>15}{'first batch s':>15}{'peak GB':>9}")
        run(repeated, FILL, 0)
        for name in CONTESTANTS:
            report(name, run(repeated, name, a.million_tokens * (0.1 if name in SLOW else 1)))
        many = run(repeated, RESUME, a.million_tokens)
        print(f"{RESUME}: " + ", ".join(f"{k} {v}" for k, v in many.items()))


def run(config: Path, name: str, million_tokens: float) -> dict:
    command = [sys.executable, __file__, str(config), "--only", name, "--million-tokens", str(million_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:100]}
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, m: dict):
    if "failed" in m:
        print(f"{name:34}failed: {m['failed']}")
    else:
        print(f"{name:34}{m['rate'] / 1e6:>15.2f}{m['first']:>15.2f}{m['peak'] / 1e9:>9.2f}")


def relative(paths) -> list[str]:
    """Patterns below the deepest folder without a wildcard, so that copies keep the published layout."""
    return [p[len(fixed_part(p)) :] for p in paths]


def fixed_part(pattern: str) -> str:
    cut = min([pattern.find(x) for x in "*?[{" if x in pattern], default=len(pattern))
    return pattern[: pattern.rfind("/", 0, cut) + 1]


def repeat(config: c.RunConfig, folder: Path, wanted: float) -> int:
    """Copy every source's files so often that they are about `wanted` bytes in all."""
    sources = {
        name: [
            (f, Path(fixed_part(p)))
            for p in s.paths
            for f in Path(fixed_part(p)).glob(p[len(fixed_part(p)) :].replace("{language}", "*"))
        ]
        for name, s in config.data.sources.items()
    }
    once = sum(f.stat().st_size for files in sources.values() for f, _ in files)
    times = max(1, round(wanted / once))
    for name, files in sources.items():
        for file, root in files:
            place = folder / name / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            stem, _, ending = place.name.partition(".")
            for i in range(times):
                shutil.copyfile(file, place.with_name(f"{stem}{i}.{ending}"))
    return once * times


def measure(contestant, config: c.RunConfig, tokens: float) -> dict:
    began = time.monotonic()
    rows = contestant(config)
    seen, first, cpu = 0, 0.0, cpu_seconds()
    for batch in rows:
        first = first or time.monotonic() - began
        seen += batch
        if seen >= tokens:
            break
    rows.close()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rate": seen / (cpu_seconds() - cpu), "first": first, "peak": peak}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def with_data(config: c.RunConfig, lanes: int = LANES, **data) -> c.RunConfig:
    train = replace(config.train, batch_size=lanes)
    return replace(config, train=train, data=replace(config.data, lanes=lanes, **data))


def ours(config: c.RunConfig):
    """Tokenised as it is read."""
    return ours_cached(with_data(config, token_cache=None))


def ours_cached(config: c.RunConfig):
    """From the token cache, which `fill` made before."""
    catalog, tokenizer = build_catalog(config.data), Tokenizer(config.data.tokenizer)

    def sizes():
        with Loader(config, catalog, tokenizer) as loader:
            for batch, _ in loader:
                yield batch["tokens"].size

    return sizes()


def fill(config: c.RunConfig) -> dict:
    """Put the first epoch of every source into the token cache."""
    catalog, cache = (
        build_catalog(config.data),
        TokenCache(config.data.token_cache or "", Tokenizer(config.data.tokenizer)),
    )
    plan = make_plan(config, catalog, None)
    orders = open_orders(config, catalog, plan)
    return {"tokens": sum(cache.fill(orders[s], e, b) for s, e, b in blocks(config, catalog, plan, 1))}


def resume_of_many_lanes(config: c.RunConfig) -> dict:
    """A host that owns 256 lanes of every source: its first batch after a resume, its peak memory, its state."""
    config = with_data(config, lanes=256, token_cache=None)
    catalog, tokenizer = build_catalog(config.data), Tokenizer(config.data.tokenizer)
    with Loader(config, catalog, tokenizer) as loader:
        for _ in range(20):
            state = next(loader)[1]
    began, cpu = time.monotonic(), cpu_seconds()
    with Loader(config, catalog, tokenizer, state) as loader:
        next(loader)
        seconds, used = time.monotonic() - began, cpu_seconds() - cpu
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(part.nbytes for part in state)
    figures = {"first batch after resume s": seconds, "of CPU s": used, "peak GB": peak / 1e9, "state KiB": size / 1024}
    return {name: round(figure, 2) for name, figure in figures.items()}


def load(config: c.RunConfig, name: str, streaming: bool):
    """A source as a Hugging Face dataset of texts. Folders are loaded one by one: Glot500's differ in their columns."""
    from datasets import concatenate_datasets, load_dataset

    source, folders = config.data.sources[name], {}
    for p in source.paths:
        for f in sorted(Path(fixed_part(p)).glob(p[len(fixed_part(p)) :].replace("{language}", "*"))):
            folders.setdefault(f.parent, []).append(str(f))
    parts = []
    for files in folders.values():
        kind = "parquet" if files[0].endswith("parquet") else "arrow" if files[0].endswith("arrow") else "json"
        kept = {} if streaming else {"cache_dir": tempfile.mkdtemp()}
        part = load_dataset(kind, data_files=files, split="train", streaming=streaming, **kept)
        parts.append(part.select_columns([source.text_column]))
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def pack(encoded, length: int):
    """Rows of `length` from a stream of token lists, cut without regard to documents; yields tokens made."""
    held, size = [], 0
    for ids in encoded:
        held += (np.array([2], np.int32), ids, np.array([1], np.int32))
        size += len(ids) + 2
        if size >= length * 8:
            stream = np.concatenate(held)
            whole = len(stream) // length * length
            stream[:whole].reshape(-1, length)
            held, size = [stream[whole:]], len(stream) - whole
            yield whole


def huggingface(config: c.RunConfig):
    """load_dataset(streaming=True), shuffle with a buffer, interleave by probabilities, tokenise in batches, pack."""
    from datasets import interleave_datasets

    tokenizer = Tokenizer(config.data.tokenizer)
    parts = [load(config, n, streaming=True).shuffle(seed=0, buffer_size=1000) for n in config.data.sources]
    weights = np.array([s.weight for s in config.data.sources.values()])
    mixed = interleave_datasets(
        parts, probabilities=(weights / weights.sum()).tolist(), seed=0, stopping_strategy="all_exhausted"
    )
    texts = (next(iter(batch.values())) for batch in mixed.iter(batch_size=64))
    return pack(
        (ids for batch in texts for ids in tokenizer.encode([t for t in batch if t])), config.data.sequence_length
    )


class JsonlWriter:
    """Random access to a source's texts, as Grain wants it: here by the Arrow files that datasets makes of them."""

    def __init__(self, config: c.RunConfig, name: str):
        self.data = load(config, name, streaming=False).with_format("arrow")

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[int(i)].column(0)[0].as_py() or ""


def grain(config: c.RunConfig):
    """MapDataset of each source, shuffled, repeated, mixed by weights, tokenised, concatenated and split into rows."""
    import grain
    from grain.experimental import ConcatThenSplitIterDataset

    tokenizer, length = Tokenizer(config.data.tokenizer), config.data.sequence_length

    def encode(text):
        return {"tokens": np.concatenate([[2], tokenizer.encode([text])[0], [1]]).astype(np.int32)}

    parts = [grain.MapDataset.source(JsonlWriter(config, n)).seed(0).shuffle().repeat() for n in config.data.sources]
    mixed = grain.MapDataset.mix(parts, [s.weight for s in config.data.sources.values()]).map(encode)
    rows = ConcatThenSplitIterDataset(mixed.to_iter_dataset(), length_struct={"tokens": length})
    return (int(np.count_nonzero(row["tokens"])) for row in rows)


def memmap(config: c.RunConfig):
    """The limit for tokens to batches: random rows of one memory-mapped array of tokens."""
    file = tempfile.NamedTemporaryFile()
    np.random.default_rng(0).integers(0, 256_000, 32_000_000, dtype=np.int32).tofile(file.name)

    def sizes():
        stored, length, rng = np.memmap(file.name, np.int32, "r"), config.data.sequence_length, np.random.default_rng(1)
        while True:
            starts = rng.integers(0, len(stored) - length, LANES)
            yield np.stack([stored[s : s + length] for s in starts]).size

    return sizes()


def kitoken_alone(config: c.RunConfig):
    """The limit for text to tokens: nothing but the encoder, on some 8 MB of texts of every source."""
    import kitoken

    encoder = kitoken.Kitoken.from_sentencepiece_file(config.data.tokenizer)
    orders = open_orders(config, catalog := build_catalog(config.data), make_plan(config, catalog, None))
    texts = [t.decode() for order in orders for b in range(2) for w in windows(order, 0, b) for t in w.documents]
    return (sum(map(len, encoder.encode_all(texts[i : i + 64], False))) for i in cycle(range(0, len(texts), 64)))


RESUME, FILL = "256 lanes", "fill"
CONTESTANTS = {
    "ours, raw text": ours,
    "ours, token cache": ours_cached,
    "Hugging Face datasets, raw text": huggingface,
    "Grain, raw text": grain,
    "numpy memmap, tokens": memmap,
    "kitoken alone, texts": kitoken_alone,
}
SLOW = ("Hugging Face datasets, raw text", "Grain, raw text")


if __name__ == "__main__":
    main()
