"""The sample corpora: the published layouts, the tokenizer's contract, and that they are what make_sample.py makes."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm
import zstandard

DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLE = DATA / "sample"
BIG = ("ja", "zh", "ko", "en")


def parquet_lines(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def arrow_table(path: Path) -> pa.Table:
    with pa.ipc.open_stream(path) as stream:
        return stream.read_all()


def jsonl_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(raw)
    return zstandard.ZstdDecompressor().decompress(raw) if path.suffix == ".zst" else raw


def corpora(root: Path) -> dict[str, list[str]]:
    """Corpus or language -> its documents."""

    def jsonl(pattern):
        lines = [line for path in sorted(root.glob(pattern)) for line in jsonl_bytes(path).splitlines()]
        return [json.loads(line)["text"] for line in lines]

    files = sorted(root.glob("cc100-ja/*.parquet"))
    ja = [text for path in files for text in "".join(parquet_lines(path)).removesuffix("\n").split("\n\n")]
    big = {"ja": ja, "zh": jsonl("skypile/data/*"), "ko": jsonl("llama2ko/ko-*"), "en": jsonl("llama2ko/en-*")}
    many = {path.parts[-3]: arrow_table(path)["text"].to_pylist() for path in root.glob("glot500/*/train/*.arrow")}
    return big | many


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return corpora(SAMPLE)


@pytest.fixture(scope="module")
def sp() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer/tokenizer.model"))


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[Path]:
    """Two fresh builds, each by its own process."""
    folders = [tmp_path_factory.mktemp("build") for _ in range(2)]
    for folder in folders:
        subprocess.run([sys.executable, DATA / "make_sample.py", "--out", folder], check=True)
    return folders


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def content(root: Path, name: str):
    """What a file says, free of what a compressor's or a library's version does to its bytes."""
    path = root / name
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        table = arrow_table(path)
        return table.schema.metadata, table.to_pylist()
    return jsonl_bytes(path) if ".jsonl" in name else path.read_bytes()


def test_two_builds_write_the_same_bytes(builds):
    assert files(builds[0]) == files(builds[1])
    for path in builds[0].rglob("*.gz"):
        assert path.read_bytes()[4:8] == bytes(4), "gzip recorded the time, which two quick builds can share"


def test_the_files_kept_hold_what_a_fresh_build_holds(builds):
    kept, fresh = sorted(files(SAMPLE)), sorted(files(builds[0]))
    assert kept == fresh
    assert [name for name in kept if content(SAMPLE, name) != content(builds[0], name)] == []


def test_everything_stays_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 3_000_000


def test_volume_and_variety(texts):
    for name in BIG:
        size = sum(len(text.encode()) for text in texts[name])
        assert 120_000 < size < 200_000 and len(texts[name]) > 200, (name, size, len(texts[name]))
    for name, documents in texts.items():
        assert len(set(documents)) == len(documents), f"{name} repeats a document"
        assert all(text == text.strip() and text for text in documents), name


def test_no_two_documents_share_most_of_their_sentences(texts):
    for name in BIG:
        split = [set(text.replace("。", ". ").replace("\n", " ").split(". ")) - {""} for text in texts[name]]
        for i, one in enumerate(split):
            close = [j for j in range(i) if len(one & split[j]) * 2 > max(len(one), len(split[j]), 3)]
            assert not close, (name, texts[name][i], texts[name][close[0]])


def test_cc100_is_one_row_a_line_and_documents_cross_row_groups():
    for path in (SAMPLE / "cc100-ja/train_0.parquet", SAMPLE / "cc100-ja/train_1.parquet"):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["id", "text"] and set(file.schema_arrow.types) == {pa.string()}
        groups = [file.read_row_group(i)["text"].to_pylist() for i in range(file.num_row_groups)]
        assert len(groups) >= 2
        assert all(line.endswith("\n") and line.count("\n") == 1 for group in groups for line in group)
        crossing = [a for a, b in zip(groups, groups[1:], strict=False) if a[-1] != "\n" and b[0] != "\n"]
        assert crossing, f"no document of {path.name} crosses a row group"


@pytest.mark.parametrize("pattern", ["skypile/data/*.jsonl", "llama2ko/ko-*.jsonl.gz", "llama2ko/en-*.jsonl.zst"])
def test_jsonl_rows_have_one_field(pattern):
    paths = list(SAMPLE.glob(pattern))
    assert len(paths) == (2 if "skypile" in pattern else 1)
    for path in paths:
        assert all(list(json.loads(line)) == ["text"] for line in jsonl_bytes(path).splitlines())


def test_glot500_is_uneven_and_of_many_scripts():
    tables = {path.parts[-3]: arrow_table(path) for path in SAMPLE.glob("glot500/*/train/*.arrow")}
    rows = {language: table.num_rows for language, table in tables.items()}
    assert len(rows) >= 34 and len({language.split("_")[1] for language in rows}) >= 12
    assert sum(n == 7 for n in rows.values()) >= 5 and max(rows.values()) >= 200
    assert {tuple(table.column_names) for table in tables.values()} == {
        ("text", "language"),
        ("text", "language", "__index_level_0__"),
    }
    assert all(set(table["language"].to_pylist()) == {language} for language, table in tables.items())


def test_glot500_folders_are_saved_datasets():
    for folder in SAMPLE.glob("glot500/*/train"):
        state, info = (json.loads((folder / name).read_text()) for name in ("state.json", "dataset_info.json"))
        table = arrow_table(folder / state["_data_files"][0]["filename"])
        assert list(info["features"]) == table.column_names
        assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] == info["features"]


def test_special_ids_are_gemmas(sp):
    assert sp.vocab_size() == 4096
    assert [sp.id_to_piece(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert (sp.pad_id(), sp.eos_id(), sp.bos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sp.encode("<bos>a<eos>") != [sp.bos_id(), *sp.encode("a"), sp.eos_id()], "a text can forge a document's edge"


@pytest.mark.parametrize("text", ["🦊 ᚠᛇᚻ\x00", "  two  spaces ", "\n\nline\n", "\t", "ｶﾞ\u200b", "no\u00a0break"])
def test_any_text_survives(sp, text):
    ids = sp.encode(text)
    assert sp.decode(ids) == text and sp.unk_id() not in ids


def test_unseen_characters_become_bytes_and_digits_stand_alone(sp):
    assert [sp.id_to_piece(i) for i in sp.encode("🦊")] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"]
    assert [sp.id_to_piece(i) for i in sp.encode("2024")] == ["2", "0", "2", "4"]


def test_two_encoders_agree_on_every_document(sp, texts):
    hugging_face = pytest.importorskip("tokenizers").Tokenizer.from_file(str(SAMPLE / "tokenizer/tokenizer.json"))
    for name, documents in texts.items():
        for text in documents:
            ids = sp.encode(text)
            assert hugging_face.encode(text).ids == [2, *ids], (name, text)
            assert sp.decode(ids) == text


def test_transformers_loads_the_folder():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SAMPLE / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.encode("a")[0] == 2 and tokenizer.encode("a").count(2) == 1
    assert tokenizer.decode(tokenizer.encode("🦊 one\n\ntwo"), skip_special_tokens=True) == "🦊 one\n\ntwo"
