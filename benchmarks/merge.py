"""Merging: seconds and memory of `merge` on a synthetic model, beside a raw copy of the same bytes.

    python benchmarks/merge.py [--model configs/model/gemma-2b.yaml] [--layers N] [--folder DIR]

Makes random bfloat16 models and merges them: a linear mixture, a chat vector, and slerp into bfloat16, the first two also
into a checkpoint, in float32. Each part is a process of its own that begins with nothing of its input in the page cache.
benchmarks/export.py says how it is measured. Needs about 12 bytes of disk a parameter.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from export import forget, header, largest, report, run, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/model/gemma-2b.yaml")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    a = parser.parse_args()
    export = [sys.executable, str(Path(__file__).with_name("export.py")), "--model", a.model]
    export += ["--layers", str(a.layers)] if a.layers else []
    merge = [sys.executable, "-m", "easylm_mling", "merge"]
    with tempfile.TemporaryDirectory(prefix="benchmark_merge_", dir=a.folder) as folder:
        models = [f"{folder}/model{i}" for i in range(3)]
        for model in models:
            subprocess.run([*export, "--part", "make", model], check=True)
        one, tensor = size(models[0]), 2 * largest(models[0])
        print(f"{one / 1e9:.2f} GB in bfloat16 each, largest tensor {tensor / 1e6:.0f} MB in float32")
        header()
        report("nothing", run([sys.executable, "-c", "import easylm_mling.merge.writing"]), 0)
        for name, flags, count in (
            ("linear", ["--linear", *models[:2]], 2),
            ("linear, float32", ["--checkpoint", "--linear", *models[:2]], 2),
            ("vector", ["--chat-vector", *models], 3),
            ("vector, float32", ["--checkpoint", "--chat-vector", *models], 3),
            ("slerp", ["--slerp", *models[:2]], 2),
        ):
            copied = report("raw copy", run([*export, "--part", "copy", models[0]], models[0]), 2 * one)
            for model in models:
                forget(Path(model))
            measured = run([*merge, f"{folder}/out", *flags])
            report(name, measured, count * one + size(f"{folder}/out"), copied)
            print(f"{'':18}bound: {(1.3 * tensor * count + 300e6) / 1e6:.0f} MB of memory")
            shutil.rmtree(f"{folder}/out")


if __name__ == "__main__":
    main()
