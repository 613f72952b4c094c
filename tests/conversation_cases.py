"""Conversations in four languages as rows of every format, templates of checkpoints, and what is trained of them."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import orjson
import zstandard

from easylm_mling.config import ConversationConfig
from easylm_mling.data.conversations.encoding import UNTRAINED, ConversationEncoder
from easylm_mling.data.conversations.templates import plain_names, read_template
from easylm_mling.data.tokenization.tokenizer import Tokenizer

SAMPLE = Path("data/sample")
TOKENIZERS = {"sentencepiece": SAMPLE / "tokenizer/tokenizer.model", "json": SAMPLE / "tokenizer/tokenizer.json"}

# Written as published chat templates are: roles checked and an error for a system line; a system line before the first
# question; a turn of its own, with the date; one that leaves an earlier answer's thoughts out.
GEMMA_LIKE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system line') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
PREFIX_LIKE = """{{ bos_token }}{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in messages if m['role'] != 'system' %}
{{- '<start_of_turn>' + m['role'] + '\\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"""
DATED = """{{ '<bos><start_of_turn>system\\nToday is ' + strftime_now('%d %b %Y') + '<end_of_turn>' }}
{%- for m in messages %}
{{- '<start_of_turn>' + m['role'] + '\\n\\n' }}{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\\n\\n' }}{% endif %}"""
NO_END = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
FORGETFUL = """{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}
{{- '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"""
JINJA = {"gemma-like": GEMMA_LIKE, "prefix-like": PREFIX_LIKE, "dated": DATED, "no-end": NO_END}
TEMPLATES = [*plain_names(), *JINJA]


@cache
def tokenizer(kind: str = "sentencepiece") -> Tokenizer:
    return Tokenizer(str(TOKENIZERS[kind]))


@cache
def encoder(template: str, kind: str = "sentencepiece", length: int = 4096, **settings) -> ConversationEncoder:
    """Of a name in TEMPLATES, or of a template's own text."""
    config = ConversationConfig(**{"date": "2024-07-26", **settings})
    if template in plain_names():
        named = ConversationConfig(template=template)
        return ConversationEncoder(config, read_template(named, "", "k"), tokenizer(kind), length, "k")
    text = {"kind": "jinja", "text": JINJA.get(template, template)}
    return ConversationEncoder(config, text, tokenizer(kind), length, "k")


def conversation(*turns: str, system: str = "", **first) -> bytes:
    """Canonical JSON of questions and answers in turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return orjson.dumps({"messages": messages})


def trained_runs(tokens: np.ndarray) -> list[list[int]]:
    """The ids of each run of targets."""
    runs, before = [], False
    for token in tokens.tolist():
        is_target = not token & UNTRAINED
        if is_target:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = is_target
    return runs


@cache
def texts(language: str) -> list[str]:
    """Real text of ja, zh, ko or en: the paragraphs of the sample corpora."""
    if language == "ja":
        import pyarrow.parquet as pq

        found = [t for f in sorted(SAMPLE.glob("cc100-ja/*.parquet")) for t in pq.read_table(f)["text"].to_pylist()]
    elif language == "zh":
        raw = [f.read_bytes() for f in sorted(SAMPLE.glob("skypile/data/*"))]
        raw = [gzip.decompress(r) if r[:2] == b"\x1f\x8b" else r for r in raw]
        found = [json.loads(line)["text"] for r in raw for line in r.splitlines()]
    elif language == "ko":
        file = next(SAMPLE.glob("llama2ko/ko-*.gz"))
        found = [json.loads(line)["text"] for line in gzip.decompress(file.read_bytes()).splitlines()]
    else:
        file = next(SAMPLE.glob("llama2ko/en-*.zst"))
        found = [json.loads(x)["text"] for x in zstandard.ZstdDecompressor().decompress(file.read_bytes()).splitlines()]
    return [line.strip() for text in found for line in text.split("\n") if line.strip()][:1200]
