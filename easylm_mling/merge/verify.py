"""Verify a merge: it is made again, and compared with the files bit for bit."""

import importlib.util
from pathlib import Path

from easylm_mling.errors import VerificationError
from easylm_mling.hf.config import hf_config, model_config_from_hf
from easylm_mling.hf.exporting import plan_shards
from easylm_mling.hf.importing import open_weights
from easylm_mling.hf.tensor_files import DTYPES
from easylm_mling.hf.verify import one_bos, same_logits
from easylm_mling.merge.opening import open_merge
from easylm_mling.merge.recipe import MergeRecipe


def verify_merge(recipe: MergeRecipe, hf_dir: str | Path) -> list[str]:
    """Merge again and compare the files of `hf_dir`, bit for bit; then their tokenizer and logits with transformers'.

    Returns a line for each check. Raises VerificationError that names the first difference.
    """
    opened = open_merge(recipe)
    stored, wanted = (hf_config(m, "float32") for m in (model_config_from_hf(hf_dir), opened.model))
    for key, value in wanted.items():
        if stored[key] != value:
            raise VerificationError(f"{hf_dir}/config.json: {key}={stored[key]}, and merged it is {value}")
    weights = open_weights(hf_dir, opened.model)
    (tag,) = {part.get_dtype() for part in weights.values()}
    read, tensors, count = opened.merging.rounded(DTYPES[tag]), opened.merging.first.tensors, 0
    for shard in plan_shards(opened.model, DTYPES[tag].itemsize, float("inf")).values():
        for tensor in shard:
            written = weights[tensor.name][tuple(slice(0, n) for n in tensor.parameter.hf_shape)].reshape(-1)
            start = 0
            for values in read(tensor):
                if written[start : start + values.size].tobytes() != values.tobytes():
                    raise VerificationError(f"{hf_dir}: tensor {tensor.name} is not what the recipe gives; merge again")
                start += values.size
            count += tensor.nbytes
    lines = [f"{len(tensors)} tensors ({count:,} bytes) are bit for bit what the recipe gives in {tag}"]
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return [*lines, "not checked: logits and tokenizer (install torch and transformers to compare them)"]
    return [*lines, one_bos(Path(hf_dir), opened.model), same_logits(Path(hf_dir), opened.model)]
