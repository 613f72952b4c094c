"""Hugging Face in and out: seconds and memory of import-hf and export-hf beside a raw copy of the same bytes.

    python benchmarks/export.py [--model configs/model/gemma-2b.yaml] [--layers N] [--turns 2] [--folder DIR]

Makes random bfloat16 weights in the model's shapes, imports them and exports them again, `--turns` times. Both are compared,
byte for byte. Needs about 10 bytes of disk a parameter (25 GB for Gemma 2B).

Every part is a process of its own, with one device, and begins with nothing of its input in the page cache. Measured by
the operating system:

    peak RSS   wait4's ru_maxrss, which counts pages of files that are mapped and can be dropped at any time
    anonymous  the highest RssAnon of /proc/PID/status, asked for every 10 ms: memory that is really taken
    MB/s       bytes read and bytes written, the latter until they are on disk: bfloat16 on one side, float32 on the other
    of a copy  those beside the bytes read and written by a raw copy, 16 MB at a time, just before
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


# Only the standard library up here: a child's ru_maxrss begins at what its parent held.
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/model/gemma-2b.yaml")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.part:
        {"make": lambda to: make(to, a.model, a.layers), "copy": copy}[a.part[0]](Path(a.part[1]))
        return
    this = [sys.executable, __file__, "--model", a.model, *(["--layers", str(a.layers)] if a.layers else [])]
    verb = [sys.executable, "-m", "easylm_mling"]
    with tempfile.TemporaryDirectory(prefix="benchmark_export_", dir=a.folder) as folder:
        source, checkpoint, exported = (f"{folder}/{name}" for name in ("source", "checkpoint", "exported"))
        subprocess.run([*this, "--part", "make", source], check=True)
        print(f"{size(source) / 1e9:.2f} GB in bfloat16, largest tensor {largest(source) / 1e6:.0f} MB")
        header()
        report("nothing", run([sys.executable, "-c", "import easylm_mling.hf.exporting, easylm_mling.hf.importing"]), 0)
        for turn in range(1, a.turns + 1):
            copied = report("raw copy", run([*this, "--part", "copy", source], source), 2 * size(source))
            imported = run([*verb, "import-hf", source, checkpoint], source)
            report(f"import-hf {turn}", imported, size(source) + size(checkpoint), copied)
            copied = report("raw copy", run([*this, "--part", "copy", source], source), 2 * size(source))
            done = run([*verb, "export-hf", checkpoint, exported], checkpoint)
            report(f"export-hf {turn}", done, size(checkpoint) + size(exported), copied)
            same = [filecmp(file, Path(exported, file.name)) for file in weights(source)]
            print(f"{'':18}the export is {'' if all(same) else 'NOT '}what was imported, byte for byte")
            for folder_name in (checkpoint, exported):
                shutil.rmtree(folder_name)


def run(command: list[str], source: str | None = None) -> dict:
    """Seconds, processor seconds, peak RSS and peak anonymous memory (bytes) of a command; the files in `source` are read from disk."""
    if source:
        forget(Path(source))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    began = time.monotonic()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    anonymous = 0
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        anonymous = max(anonymous, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    seconds = time.monotonic() - began
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "rss": usage.ru_maxrss * 1024, "anonymous": anonymous}


def header():
    print(
        f"{'':18}{'seconds':>8}{'CPU s':>7}{'MB/s':>7}{'of a copy':>11}{'peak RSS MB':>13}{'anonymous MB':>14}{'load':>7}"
    )


def report(name: str, m: dict, moved: int, copied: float = 0.0) -> float:
    """Print one part that read and wrote `moved` bytes, beside a raw copy's MB/s; return its own."""
    rate = moved / m["seconds"] / 1e6
    beside = f"{rate / copied:.2f}" if copied else "-"
    print(
        f"{name:18}{m['seconds']:>8.1f}{m['cpu']:>7.1f}{rate if moved else 0:>7.0f}{beside:>11}{m['rss'] / 1e6:>13.0f}"
        f"{m['anonymous'] / 1e6:>14.0f}{os.getloadavg()[0]:>7.1f}",
        flush=True,
    )
    return rate


def make(folder: Path, model_file: str, layers: int | None):
    """A Hugging Face directory of random weights, one tensor in memory."""
    import dataclasses

    import numpy as np

    from easylm_mling.config import ModelConfig, from_tree
    from easylm_mling.config.yaml12 import read_yaml
    from easylm_mling.hf.config import hf_config
    from easylm_mling.hf.exporting import plan_shards, shard_header, shard_index
    from easylm_mling.hf.importing import INDEX
    from easylm_mling.hf.json_files import write_json
    from easylm_mling.hf.tensor_files import DTYPES

    model = from_tree(ModelConfig, read_yaml(Path(model_file).read_bytes())["model"])
    model = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    # Every value of a short list, from a place of its own in every tensor; drawing them all would take minutes.
    drawn = (0.02 * np.random.default_rng(0).standard_normal(10_000_019, np.float32)).astype(DTYPES["BF16"])
    shards = plan_shards(model, 2, 5e9)
    folder.mkdir()
    at = 0
    for name, tensors in shards.items():
        with open(folder / name, "xb") as file:
            file.write(shard_header(tensors, "BF16"))
            for tensor in tensors:
                left, at = tensor.nbytes // 2, at + 1_000_003
                while left:
                    values = drawn[at % drawn.size :][:left]
                    file.write(values.view(np.uint8).data)
                    left, at = left - values.size, at + values.size
            file.flush()
            os.fsync(file.fileno())
    write_json(folder / INDEX, shard_index(shards))
    write_json(folder / "config.json", hf_config(model, "bfloat16"))
    if len(shards) == 1:
        (folder / INDEX).unlink()


def copy(folder: Path):
    """Read and write every file of `folder`, until the copies are on disk; they are removed again."""
    for path in files(folder):
        target = path.with_name(f"{path.name}.copy")
        with open(path, "rb", buffering=0) as source, open(target, "xb", buffering=0) as file:
            while block := source.read(16_000_000):
                file.write(block)
            os.fsync(file.fileno())
    for path in folder.rglob("*.copy"):
        path.unlink()


def forget(folder: Path):
    """Drop the files from the page cache, once they are on disk."""
    for path in files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def filecmp(a: Path, b: Path) -> bool:
    with open(a, "rb") as first, open(b, "rb") as second:
        while block := first.read(16_000_000):
            if block != second.read(16_000_000):
                return False
        return not second.read(1)


def largest(folder: str) -> int:
    """Bytes of the largest tensor in the .safetensors files."""
    import json

    found = 0
    for path in weights(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        found = max(found, *(stop - start for start, stop in spans))
    return found


def weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size(folder: str) -> int:
    return sum(path.stat().st_size for path in files(Path(folder)))


if __name__ == "__main__":
    main()
