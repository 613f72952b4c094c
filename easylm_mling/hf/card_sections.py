"""Sections that every model card has, of an export and of a merge: front matter, how to load it, licence and limits."""

import re
from dataclasses import dataclass
from pathlib import Path

import orjson

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError

# A language's folder is named ja or jpn_Jpan; the hub wants the ISO 639 code in it.
_FOLDER = re.compile(r"([a-z]{2})|([a-z]{3})_[A-Z][a-z]{3}")

PRETRAINED = "This is a pretrained model. It continues text, follows no instructions, and was not made safe."


@dataclass(frozen=True)
class Export:
    """What is exported, and how."""

    checkpoint_dir: str | Path  # of a run or an import
    files: Path  # the small files of `checkpoint_dir`
    step: int
    model: ModelConfig
    dtype: str
    name: str  # on the hub, or the folder's
    bos: int | None = None  # how many of BOS transformers' tokenizer puts before a text; None: not seen


def front_matter(values: dict, gemma: bool, codes: list[str]) -> str:
    """Return the YAML at the top of a card: `values` and what every card has; `codes` are languages."""
    values = {"library_name": "transformers", "pipeline_tag": "text-generation", **values}
    if gemma:
        values["license"] = "gemma"
    if codes:
        values["language"] = codes
    # JSON is YAML too, and its quotes keep the language "no" from being read as false.
    return "\n".join(["---", *(f"{key}: {orjson.dumps(value).decode()}" for key, value in values.items()), "---", ""])


def usage(export: Export, separator: tuple[str, int] | None = None) -> str:
    """Return the section on how to load it. `separator`: the tokenizer's, where it has no BOS (hf/tokenizer.py)."""
    name, bos = export.name, export.model.bos_token_id
    note = f"the model needs exactly one BOS (id {bos}) here; " + (
        f"its tokenizer adds {export.bos}" if export.bos is not None else "not checked whether its tokenizer adds it"
    )
    note = f"adds the one BOS (id {bos}) that the model needs" if export.bos == 1 else note
    note = "the model has no BOS" if bos < 0 else note
    if separator and not export.bos:
        note = f"adds no BOS; a text that begins a document follows {separator[0]} (id {separator[1]})"
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="{export.dtype}")
inputs = tokenizer("...", return_tensors="pt")  # {note}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

In transformers 4 `dtype` is called `torch_dtype`.
"""


def limits(gemma: bool, derived: bool, kind: str = PRETRAINED) -> str:
    """Return the section on licence and limits; `kind` says what sort of model it is."""
    if gemma:
        licence = (
            "Derived from Gemma: the Gemma Terms of Use (https://ai.google.dev/gemma/terms) apply to these weights."
        )
    elif derived:
        licence = "Derived from other weights: their licence applies to these too."
    else:
        licence = "Not derived from other weights: whoever publishes them chooses the licence, and names it here."
    return f"""## Licence and limits

{licence} The corpora have licences of their own.

{kind}
It repeats what its corpora say, also what is false or offensive, and is weaker in languages that it read little of.
Losses on held-out text do not say how useful it is: evaluate it for your use.
"""


def has_gemma_terms(model: ModelConfig) -> bool:
    """Return True for the models that have Google's own terms; Gemma 4 has the Apache licence."""
    return model.model_type in ("gemma", "gemma2", "gemma3_text")


def language_codes(languages: tuple[str, ...], by_source: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the sorted ISO 639 codes of `languages` and of the data's folders. Raises ConfigError for one that is no code."""
    for code in languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            raise ConfigError(f"language {code!r} is no ISO 639 code; write two or three letters, such as ja")
    matches = (_FOLDER.fullmatch(tag) for tags in by_source.values() for tag in tags)
    return sorted({*languages, *(match[1] or match[2] for match in matches if match)})
