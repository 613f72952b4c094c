"""Branches against a mixture: four corpora trained apart from one start and merged afterwards, beside one run on all four.

    python benchmarks/branches.py [--folder DIR] [--start-tokens N] [--tokens N] [--rates R R ...]

The demo's model is trained on the demo's sources; from there one branch a corpus (ja, zh, ko, en) with a quarter of `--tokens`
each, and one run with all of them on the four corpora in equal parts. `merge --search` chooses the weights of the four
differences. Branches and mixture may want other learning rates, so each of `--rates` is tried for both, and all of it is
printed: bits a byte on the half of the held-out rows that nothing was chosen on. Took 41 minutes on
two cores that had other work, too; what was done is not done again in the same --folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = Path("configs/demo.yaml")
CORPORA = {"ja": "cc100-ja", "zh": "skypile", "ko": "llama2ko-ko", "en": "llama2ko-en"}
ROWS, EVALUATIONS = 16, 40
ONE_DEVICE = ("mesh.cpu_devices=1", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the runs stay (default: a temporary folder)")
    parser.add_argument("--start-tokens", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=160_000, help="of all branches together, and of the mixture")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.003])
    a = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="benchmark_branches_") as temporary:
        folder = Path(a.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = train(folder / "start", [], a.start_tokens, 0.005)
        found = {}
        for rate in a.rates:
            of_rate = folder / f"rate-{rate:g}"
            branches = [train(of_rate / k, [c], a.tokens // 4, rate, start) for k, c in CORPORA.items()]
            mixed = train(of_rate / "mixed", list(CORPORA.values()), a.tokens, rate, start)
            found |= compare(of_rate, rate, start, branches, mixed)
        print(f"\nbits a byte, {a.tokens:,} tokens in all after {a.start_tokens:,}")
        print(f"{'':42}{'mean':>8}" + "".join(f"{k:>8}" for k in CORPORA))
        for name, tried in found.items():
            each = "".join(f"{tried.sources[c]:8.4f}" for c in CORPORA.values())
            print(f"{name:42}{tried.reported:8.4f}{each}")


def train(run: Path, corpora: list[str], tokens: int, rate: float, start: Path | None = None) -> Path:
    """Train on `corpora` in equal parts (none: the demo's own mixture), from `start` or from random parameters."""
    if (run / "summary.txt").is_file():
        return run
    config = run.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_bytes(config_of(corpora))
    settings = [f"run_dir={run}", f"train.budget_tokens={tokens}", f"optimizer.learning_rate={rate}", *ONE_DEVICE]
    settings += [
        "optimizer.warmup=8000 tokens",
        "eval.every_steps=0",
        "eval.rows_per_source=4",
        "train.log_every_steps=10",
    ]
    settings += [f"init_from={start}"] if start else []
    text = command("train", str(config), *settings)
    (run / "summary.txt").write_text(text, encoding="utf-8")
    return run


def config_of(corpora: list[str]) -> bytes:
    """Return the demo's config with these sources, each of weight 1; with all of its own if there are none."""
    from easylm_mling.config.yaml12 import read_yaml, write_yaml

    tree = read_yaml(DEMO.read_bytes())
    sources = tree["data"]["sources"]
    if corpora:
        tree["data"]["sources"] = {name: sources[name] | {"weight": 1} for name in corpora}
    return write_yaml(tree).encode()


def compare(folder: Path, rate: float, start: Path, branches: list[Path], mixed: Path) -> dict:
    """Search for the weights of the branches, and measure everything on the same rows: name -> Tried."""
    from easylm_mling.config import load_mixer
    from easylm_mling.inference.generate import load_model
    from easylm_mling.merge.recipe import load_recipe
    from easylm_mling.merge.search import Search, SearchOptions, load_written

    recipe, corpora = folder / "recipe.yaml", folder / "mixed.yaml"
    models = "".join(f"  - {{model: {branch}, weight: 0.25}}\n" for branch in branches)
    recipe.write_text(f"kind: task_arithmetic\nbase: {start}\nmodels:\n{models}", encoding="utf-8")
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    print(command("merge", str(recipe), str(out), "--dtype", "float32", "--search", str(corpora), "--rows", str(ROWS),
                  "--evaluations", str(EVALUATIONS), "--bounds", "0", "1.5"))  # fmt: skip
    search = Search(load_recipe(recipe), SearchOptions(load_mixer([str(corpora)], []), rows=ROWS))
    mesh = search.halves[0].mesh
    of = {f"{rate:g}, branch {key}": branch for key, branch in zip(CORPORA, branches, strict=True)}
    of = {"start": start, **of, f"{rate:g}, mixed run": mixed}
    found = {name: search.measure(load_model(run, mesh)[1]) for name, run in of.items()}
    found[f"{rate:g}, mean of the branches"] = search.evaluate((0.25,) * 4)
    found[f"{rate:g}, sum of the branches' differences"] = search.evaluate((1.0,) * 4)
    found[f"{rate:g}, branches, searched weights"] = search.measure(load_written(out, search))
    return found


def command(*arguments: str) -> str:
    """Run a command of easylm-mling and return what it prints. Raises RuntimeError with the end of it if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "easylm_mling", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
