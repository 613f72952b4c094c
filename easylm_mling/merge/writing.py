"""Write a merge: into a Hugging Face directory, or into a checkpoint that training starts from."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from easylm_mling.checkpoint.writing import check_room, write_checkpoint
from easylm_mling.config import to_tree
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import fingerprints
from easylm_mling.hf.exporting import dtype_tag, plan_shards, write_settings, write_shards
from easylm_mling.hf.tensor_files import DTYPES
from easylm_mling.merge.card import record, title, write_merge_card
from easylm_mling.merge.opening import Opened, open_merge
from easylm_mling.merge.recipe import MergeRecipe
from easylm_mling.model.params import Parameter, parameter_table
from easylm_mling.storage.atomic import atomic_directory


def merge_to_hf(
    recipe: MergeRecipe,
    hf_dir: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
    name: str | None = None,
    languages: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> tuple[Opened, list[str]]:
    """Write a merged model for transformers; returns what was merged and warnings, one line each.

    Values are computed as float32 and rounded once to `dtype`. In memory are a piece of a tensor of each model, and for slerp
    one tensor of both. `notes` are further sentences of the card. Raises ConfigError for models that do not fit each other, values that are not finite, and an
    `hf_dir` with content; then nothing is left.
    """
    tag = dtype_tag(dtype, max_shard_bytes)
    opened = open_merge(recipe)
    opened.notes.extend(notes)
    shards = plan_shards(opened.model, DTYPES[tag].itemsize, max_shard_bytes)
    check_room(hf_dir, sum(t.nbytes for group in shards.values() for t in group), "weights")
    with atomic_directory(hf_dir) as partial:
        tokenizer_files, bos, warnings = write_settings(partial, opened.tokenizer, opened.model, dtype, hf_dir)
        write_shards(partial, shards, tag, opened.merging.rounded(DTYPES[tag]))
        # The digests of the models are known only now.
        write_merge_card(partial, opened, dtype, name or Path(hf_dir).name, bos, languages)
    if not {"tokenizer.model", "tokenizer.json"} & {*tokenizer_files}:
        warnings.append(f"{opened.tokenizer}: holds no tokenizer, so {hf_dir} has none; copy the model's files into it")
    return opened, warnings


def merge_to_checkpoint(recipe: MergeRecipe, checkpoint_dir: str | Path) -> Opened:
    """Write a merged model as a float32 checkpoint, step 0 of `checkpoint_dir`, for `init_from` and `export-hf`.

    In memory are what `merge_to_hf` has and a few pieces that are being written. Raises ConfigError as `merge_to_hf`.
    """
    opened = open_merge(recipe)
    (group,) = plan_shards(opened.model, 4, float("inf")).values()
    tensors = {t.name: t for t in group}

    def read(p: Parameter, layer: int) -> Iterator[np.ndarray]:
        return opened.merging.read(tensors[p.hf_names[layer]])

    def describe(folder: Path) -> dict:
        copy_tokenizer(opened.tokenizer, folder / TOKENIZER_FOLDER)
        return {
            "source": {"name": title(opened), "revision": None, "hub": False},
            "model": to_tree(opened.model),
            "source_dtype": "float32",
            "merge": record(opened),
            "tokenizer": sorted(fingerprints(folder / TOKENIZER_FOLDER).values()),
        }

    write_checkpoint(checkpoint_dir, parameter_table(opened.model), read, describe)
    return opened
