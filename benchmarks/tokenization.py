"""Text to ids: both of our kinds of tokenizer beside transformers' fast tokenizer; same texts, one thread, one run.

    python benchmarks/tokenization.py [TEXT ...] [--tokenizer FOLDER] [--megabytes 10] [--rounds 3]
                                            (needs transformers: pip install 'easylm-mling[hf]')

TEXT are files or folders, read as `data.sources` reads them; by default the sample corpora. FOLDER holds a tokenizer.json
and a tokenizer.model of one vocabulary, by default the sample's. No published byte-level tokenizer.json is here, so one of
Llama 3's kind is trained on every tenth text.

All get the same lists of 64 documents, as the loader makes them. Every round runs all contestants, and each has the rate of
its best round. A rate is bytes of text over CPU seconds of the process. Before, ids are compared: those of a tokenizer.json
are transformers' for every text, with what it takes transformers to leave control tokens in texts alone.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from easylm_mling.config import DataConfig, SourceConfig  # noqa: E402
from easylm_mling.data.catalog import build_catalog  # noqa: E402
from easylm_mling.data.shuffle import EpochOrder, epoch_windows  # noqa: E402
from easylm_mling.data.tokenization.tokenizer import Tokenizer  # noqa: E402

SAMPLE = Path(__file__).parents[1] / "data/sample"
BATCH = 64
PIECES = 32_000  # of the byte-level tokenizer
# Llama 3's words: contractions, letters with what stands before them, digits by three, other signs, white space.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = [str(f) for f in sorted(SAMPLE.iterdir()) if f.is_dir() and f.name != "tokenizer"]
    parser.add_argument("text", nargs="*", default=corpora)
    parser.add_argument("--tokenizer", default=str(SAMPLE / "tokenizer"))
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    texts = texts_of(a.text, a.megabytes * 1e6)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB; the best of {a.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="benchmark_tokenization_") as folder:
        byte_level(Path(folder), texts[::10])
        contestants = contestants_of(Path(a.tokenizer), Path(folder))
        compare_ids(contestants, texts)
        best = dict.fromkeys(contestants, float("inf"))
        for _ in range(a.rounds):
            for name, encode in contestants.items():
                best[name] = min(best[name], seconds(encode, texts))
    print(f"{'':52}{'MB/core-s':>10}{'Mtokens/core-s':>16}{'bytes a token':>15}")
    for name, encode in contestants.items():
        tokens = sum(len(ids) for ids in encode(texts))
        print(f"{name:52}{size / 1e6 / best[name]:>10.2f}{tokens / 1e6 / best[name]:>16.2f}{size / tokens:>15.2f}")


def texts_of(paths: list[str], wanted: float) -> list[str]:
    """Read documents of about `wanted` bytes, an equal part of each path, by our own readers."""
    texts = []
    for path in paths:
        data = DataConfig("", {"s": SourceConfig((path,), 1.0, holdout_fraction=0.0)})
        size = 0
        for window in epoch_windows(EpochOrder(build_catalog(data).sources["s"], 0, data.block_bytes), 0, "train"):
            for text in window.documents:
                if size < wanted / len(paths):
                    texts.append(text.decode())
                    size += len(text)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def byte_level(folder: Path, texts: list[str]):
    """Train a byte-level BPE of Llama 3's kind into `folder`."""
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=PIECES, show_progress=False, initial_alphabet=alphabet))
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    t.add_special_tokens(list(ends.values()))
    t.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def contestants_of(sentencepiece: Path, byte_level: Path) -> dict:
    """Return name -> a function from texts to their ids, without BOS or EOS."""
    made = {"ours, tokenizer.model (SentencePiece)": Tokenizer(str(sentencepiece / "tokenizer.model")).encode}
    for label, folder in (("SentencePiece's BPE", sentencepiece), ("byte-level BPE", byte_level)):
        made[f"ours, tokenizer.json ({label})"] = Tokenizer(str(folder / "tokenizer.json")).encode
        made[f"transformers, tokenizer.json ({label})"] = theirs(folder)
    return made


def theirs(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str]) -> list[list[int]]:
        kept = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **kept)["input_ids"]

    return encode


def compare_ids(contestants: dict, texts: list[str]):
    """Raise SystemExit unless each tokenizer.json gives transformers' ids for every text."""
    for name, encode in contestants.items():
        if name.startswith("ours, tokenizer.json"):
            reference = contestants[name.replace("ours", "transformers")](texts)
            for text, mine, wanted in zip(texts, encode(texts), reference, strict=True):
                if list(mine) != list(wanted):
                    raise SystemExit(f"{name}: other ids than transformers for {text[:100]!r}")


def seconds(encode, texts: list[str]) -> float:
    """Return the CPU seconds that it takes to encode all texts, 64 at a time."""
    before = time.process_time()
    for start in range(0, len(texts), BATCH):
        encode(texts[start : start + BATCH])
    return time.process_time() - before


if __name__ == "__main__":
    main()
