"""A demo run that is interrupted in every way there is, beside one that never was: the same bits in the end.

    python tests/faults/soak.py DIRECTORY        or: make soak

Two processes, one and four take turns; they are killed and told to stop, newest checkpoints are damaged, the run is
rewound, and its disk (a tmpfs, so this wants root) is filled for a while. At the end losses, batches and parameters are
compared with the undisturbed run's, and DIRECTORY/soak.png shows both curves.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from processes import ends, printed, start  # noqa: E402

from easylm_mling.checkpoint.reading import load_data_state, load_info  # noqa: E402
from easylm_mling.hf.exporting import open_stores, stored_model  # noqa: E402
from easylm_mling.monitoring.metrics import TIMINGS, read_lines, read_metrics  # noqa: E402

SETTINGS = (
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=3",
    "eval.every_steps=55",
    "train.spike_sigmas=6",
)
# How many processes, and what befalls them. A rewind and a damage come before the start, and a kill or signal ends it.
PLAN = [
    *((2, "kill"), (2, "terminate"), (2, "kill"), (2, "damage"), (2, "kill"), (2, "rewind"), (2, "terminate")),
    *((1, "kill"), (1, "terminate"), (1, "damage"), (1, "kill"), (1, "rewind"), (1, "terminate")),
    *((4, "kill"), (4, "terminate"), (4, "damage"), (4, "kill"), (4, "rewind"), (4, "terminate")),
    *(
        (2, "full"),
        (2, "kill"),
        (2, "terminate"),
        (2, "damage"),
        (2, "kill"),
        (2, "terminate"),
        (2, "rewind"),
        (2, "kill"),
    ),
]


def launch(run_dir: Path, processes: int, *overrides: str):
    none = {"XLA_FLAGS": ""}
    both = (*SETTINGS, *overrides, "--wait-seconds=300")
    return start(run_dir, processes, *both, settings=(), devices=8, environment=none)


def steps_done(run_dir: Path) -> list[int]:
    metrics = run_dir / "metrics.jsonl"
    return [x["step"] for x in read_lines(metrics, "train")] if metrics.exists() else []


def wait_until(processes, done, seconds=900):
    until = time.monotonic() + seconds
    while not done() and all(p.poll() is None for p in processes):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.05)


def flip_a_bit(run_dir: Path) -> int:
    """In the largest file of the newest checkpoint; returns its step."""
    step = max((p for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    file = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    return int(step.name)


@contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        time.sleep(1)
        subprocess.run(["umount", str(folder)], check=True)


def disturb(run_dir: Path, count: int, what: str, rng: random.Random) -> tuple[str, int]:
    """One start of the run and its end; returns what happened, and how many interruptions it was."""
    overrides, before, extra = [], "", 0
    steps = sorted(int(p.name) for p in run_dir.glob("checkpoints/*") if p.name.isdigit())
    if what == "damage":
        before, extra = f"the checkpoint of step {flip_a_bit(run_dir)} damaged, ", 1
    elif what == "rewind":
        overrides, before, extra = [f"train.rewind={steps[-2]}"], f"rewound to {steps[-2]} from {steps[-1]}, ", 1
    filler = run_dir.parent / "filler"
    if what == "full":
        filler.write_bytes(bytes(shutil.disk_usage(run_dir).free - 6_000_000))
        before, extra = "disk filled until a save failed, ", 1
    processes = launch(run_dir, count, *overrides)
    if what == "full":
        wait_until(processes, lambda: b'"save_failed"' in (run_dir / "events.jsonl").read_bytes())
        filler.unlink()
    seen, ahead = len(steps_done(run_dir)), rng.randint(2, 5)
    wait_until(processes, lambda: len(steps_done(run_dir)) >= seen + ahead)
    time.sleep(rng.uniform(0, 1))
    at = (steps_done(run_dir) or [0])[-1]
    victim = rng.randrange(count)
    gentle = what in ("terminate", "full", "rewind")
    processes[victim].send_signal(signal.SIGTERM if gentle else signal.SIGKILL)
    codes = ends(run_dir, processes, 900)
    allowed = {42, 0} if gentle else {85, -signal.SIGKILL, -signal.SIGABRT, 0}
    assert set(codes) <= allowed, f"{codes}\n{printed(run_dir)}"
    how = "told to stop" if gentle else "killed"
    return f"{count} processes: {before}process {victim} {how} after step {at}: exit codes {codes}", 1 + extra


def assert_same(run_dir: Path, undisturbed: Path):
    """Losses, norms and ledger of every step, held-out losses, what was consumed, and the bits of every parameter."""
    for kind in ("train", "eval"):
        found, wanted = (
            [{k: v for k, v in x.items() if k not in TIMINGS} for x in read_metrics(m, kind)]
            for m in (run_dir / "metrics.jsonl", undisturbed / "metrics.jsonl")
        )
        assert found == wanted, kind
    for name, array in load_data_state(undisturbed).items():
        assert (load_data_state(run_dir)[name] == array).all()
    info, wanted = load_info(run_dir), load_info(undisturbed)
    # Those of the optimizer's moments, too.
    assert info["digests"] == wanted["digests"]
    newest = [open_stores(d / "checkpoints" / "110", stored_model(d)) for d in (run_dir, undisturbed)]
    for path, store in newest[0].items():
        assert store.read().result().tobytes() == newest[1][path].read().result().tobytes(), path


def draw(run_dir: Path, undisturbed: Path, picture: Path, interruptions: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    lines = read_lines(run_dir / "metrics.jsonl", "train")
    whole = read_metrics(undisturbed / "metrics.jsonl", "train")
    axes.plot([x["step"] for x in whole], [x["loss"] for x in whole], lw=4, color="#bbccee", label="never stopped")
    label = f"interrupted {interruptions} times: {len(lines)} steps done for {len(whole)}"
    axes.plot(
        [x["step"] for x in lines], [x["loss"] for x in lines], lw=0.8, marker=".", ms=3, color="#aa3333", label=label
    )
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title="The demo run, left alone and interrupted")
    axes.legend()
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def main(directory: Path):
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))
    rng, interruptions, last = random.Random(5), 0, 2
    undisturbed = directory / "undisturbed"
    codes = ends(undisturbed, launch(undisturbed, 2), 3000)
    assert codes == [0, 0], printed(undisturbed)
    print("undisturbed: done", flush=True)
    with small_disk(directory / "disk") as disk:
        run_dir = disk / "run"
        for count, what in PLAN:
            said, n = disturb(run_dir, count, what, rng)
            interruptions += n + (count != last)
            last = count
            print(f"{interruptions:3} {said}", flush=True)
        codes = ends(run_dir, launch(run_dir, 2), 3000)
        assert codes == [0, 0], printed(run_dir)
        assert_same(run_dir, undisturbed)
        draw(run_dir, undisturbed, directory / "soak.png", interruptions)
        (directory / "soak.jsonl").write_text((run_dir / "metrics.jsonl").read_text())
        aside = sorted(p.name for p in (run_dir / "set-aside").iterdir())
    print(json.dumps({"interruptions": interruptions, "set aside": aside}))
    print("losses, what was consumed, every parameter and moment: bit for bit those of the undisturbed run")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
