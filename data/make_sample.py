"""Write the sample corpora and train their tokenizer: `python data/make_sample.py [--out data/sample]`.

The words are in `sample_text/`; this script only draws sentences from them with a fixed seed and lays them out as
the four published corpora are laid out. The same library versions write the same bytes every time.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece as spm
import yaml
import zstandard

TEXT = Path(__file__).resolve().parent / "sample_text"
CORPUS_BYTES = 150_000
ROW_GROUP_ROWS = 200
RECORD_BATCH_ROWS = 100
VOCAB_SIZE = 4096
# Gemma's own: runs of newlines and of spaces are single pieces, and `<mask>` has id 4.
TURNS = ["<start_of_turn>", "<end_of_turn>"]
USER_SYMBOLS = ["<mask>"] + TURNS + ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "sample", help="folder to write")
    args = parser.parse_args()

    ja, zh, ko, en = (documents(name) for name in ("ja", "zh", "ko", "en"))
    languages = _read("glot500")
    glot500 = {language: sentences(language, entry) for language, entry in languages.items()}
    for i, part in enumerate(_halves(ja)):
        write_line_parquet(args.out / f"cc100-ja/train_{i}.parquet", part)
    for i, part in enumerate(_halves(zh)):
        write_file(args.out / f"skypile/data/2021-0{i + 1}_zh_middle_000{i}.jsonl", jsonl(part))
    write_file(args.out / "llama2ko/ko-00000-of-00001.jsonl.gz", gzip.compress(jsonl(ko), mtime=0))
    compressed = zstandard.ZstdCompressor(level=19).compress(jsonl(en))
    write_file(args.out / "llama2ko/en-00000-of-00001.jsonl.zst", compressed)
    for language, rows in glot500.items():
        indexed = languages[language].get("index", False)
        write_saved_dataset(args.out / f"glot500/{language}/train", language, rows, indexed)

    # sentencepiece takes no newline inside a training sentence.
    lines = [line for text in ja + zh + ko + en for line in text.split("\n")]
    lines += [row for rows in glot500.values() for row in rows]
    model = train_tokenizer(lines)
    write_file(args.out / "tokenizer/tokenizer.model", model)
    for name, content in hf_tokenizer(spm.SentencePieceProcessor(model_proto=model)).items():
        write_file(args.out / f"tokenizer/{name}", json.dumps(content, ensure_ascii=False, indent=1).encode())


def documents(name: str) -> list[str]:
    """About CORPUS_BYTES (UTF-8) of documents of 3 to 12 sentences each, from `sample_text/<name>.yaml`.

    A document keeps to one topic and one person (`who`); its topic's sentences stay in written order, and those of
    the topic `general` follow. One to three sentences make a line.
    """
    entry = _read(name)
    slots = {key: value.split("|") for key, value in entry["slots"].items()}
    topics = {key: value.splitlines() for key, value in entry["topics"].items()}
    general = topics.pop("general")
    space = "" if name in ("ja", "zh") else " "
    rng = random.Random(name)
    out, size = [], 0
    while size < CORPUS_BYTES:
        pool = topics[rng.choice(list(topics))] + general
        chosen = sorted(rng.sample(range(len(pool)), rng.randint(3, 12)))
        one_person = slots | {"who": [rng.choice(slots["who"])]}
        said = [render(pool[i], one_person, rng) for i in chosen]
        lines = []
        while said:
            n = rng.randint(1, 3)
            lines.append(space.join(s[0].upper() + s[1:] for s in said[:n]))
            del said[:n]
        out.append("\n".join(lines))
        size += len(out[-1].encode())
    return out


def sentences(language: str, entry: dict) -> list[str]:
    """`entry["rows"]` different sentences of a Glot500 language, out of all that its templates can make."""
    possible = [sentence for template in entry["text"].splitlines() for sentence in variants(template)]
    if len(possible) < entry["rows"]:
        raise ValueError(f"sample_text/glot500.yaml: {language} can make {len(possible)} sentences; lower its `rows`")
    return random.Random(language).sample(possible, entry["rows"])


def variants(template: str) -> list[str]:
    """Every sentence that `template` makes, one word taken from each `{a|b}`."""
    parts = [part.split("|") for part in re.split(r"[{}]", template)]
    return ["".join(words) for words in itertools.product(*parts)]


def render(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """`template` with each `{name}` replaced by one of `slots[name]`."""
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(slots[match[1]]), template)


def write_line_parquet(path: Path, texts: list[str]):
    """cc100-ja: one row a line, each ending in a newline; a blank row between documents; `id` counts rows in a file."""
    rows = [f"{line}\n" for line in "\n\n".join(texts).split("\n")]
    table = pa.table({"id": [str(i) for i in range(len(rows))], "text": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def jsonl(texts: list[str]) -> bytes:
    """SkyPile and llama2ko: one JSON object with one field, `text`, a line."""
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_saved_dataset(folder: Path, language: str, rows: list[str], indexed: bool):
    """Glot500: what Hugging Face's `Dataset.save_to_disk` leaves; `indexed` adds the pandas index that some carry."""
    columns = {"text": rows, "language": [language] * len(rows)}
    types = {"text": "string", "language": "string"}
    if indexed:
        columns["__index_level_0__"], types["__index_level_0__"] = list(range(len(rows))), "int64"
    features = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in types.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=RECORD_BATCH_ROWS)
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": hashlib.blake2b(sink.getvalue(), digest_size=8).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_file(folder / "data-00000-of-00001.arrow", sink.getvalue())
    write_file(folder / "dataset_info.json", json.dumps(info, indent=2).encode())
    write_file(folder / "state.json", json.dumps(state, indent=2).encode())


def train_tokenizer(lines: list[str]) -> bytes:
    """A SentencePiece BPE model with the special ids and the switches of Gemma's."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=USER_SYMBOLS,
        byte_fallback=True,
        # Rare characters fall back to bytes, so that the many scripts leave room for merges.
        character_coverage=0.995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def hf_tokenizer(sp: spm.SentencePieceProcessor) -> dict[str, dict]:
    """The JSON files of Gemma's Hugging Face tokenizer directory, for `sp`: file name -> content.

    Written as data, so that neither transformers nor tokenizers is needed. transformers 4.x obeys `add_bos_token`,
    5.x the post-processor: both say that `encode` begins with <bos>.
    """
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    config = names | {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": TURNS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
    }
    special = names | {"additional_special_tokens": TURNS}
    return {"tokenizer.json": _tokenizer_json(sp), "tokenizer_config.json": config, "special_tokens_map.json": special}


def _tokenizer_json(sp: spm.SentencePieceProcessor) -> dict:
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    control = [piece for piece, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i)]
    plain = [piece for piece, i in vocab.items() if piece not in control and not sp.is_byte(i)]
    # Ids of BPE pieces follow their scores, so this order of merges is the one in which SentencePiece merges.
    splits = ((piece[:cut], piece[cut:]) for piece in plain for cut in range(1, len(piece)))
    merges = [[left, right] for left, right in splits if left in vocab and right in vocab]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    bos_b, text_b = {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[piece], "content": piece, **flags, "special": piece in control + TURNS}
            for piece in control + USER_SYMBOLS
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos_b, text_b],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [sp.bos_id()], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def write_file(path: Path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _halves(items: list) -> tuple[list, list]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _read(name: str) -> dict:
    return yaml.safe_load((TEXT / f"{name}.yaml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
