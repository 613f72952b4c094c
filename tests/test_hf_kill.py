"""`kill -9` at any moment of an export, an import or a merge: the directory is whole or not there, and the next one ends well."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info, open_store, stored_model
from easylm_mling.config import ModelConfig, to_tree
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf
from easylm_mling.merge.recipe import MergeRecipe, ModelRef
from easylm_mling.merge.writing import merge_to_checkpoint, merge_to_hf
from easylm_mling.model.params import parameter_table
from easylm_mling.storage.atomic import atomic_directory, atomic_file
from easylm_mling.training.state import init_params

# One process loads the libraries, which takes seconds, and forks one for each export: of those, only exporting is left.
# Writes a line a kill: the moment as a share of the whole export, and "done" if it had ended before.
EXPORT_AND_KILL = """
import os, signal, sys, time
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf
from easylm_mling.merge.recipe import MergeRecipe, ModelRef
from easylm_mling.merge.writing import merge_to_checkpoint, merge_to_hf

checkpoint, folder, kills, what = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def write(out):
    recipe = MergeRecipe("linear", (ModelRef(checkpoint), ModelRef(checkpoint + "2")))
    if what == "merge":
        merge_to_hf(recipe, out, dtype="float32", max_shard_bytes=4e6)
    elif what == "merge --checkpoint":
        merge_to_checkpoint(recipe, out)
    elif what == "import":
        import_hf(f"{folder}/hf", out)
    else:
        export_hf(checkpoint, out, dtype="float32", max_shard_bytes=4e6)

def export(name):
    child = os.fork()
    if not child:
        try:
            write(f"{folder}/{name}/out")
        except BaseException as error:
            os.write(2, f"{error!r}\\n".encode())
            os._exit(1)
        os._exit(0)
    return child

def finish(child):
    assert os.waitpid(child, 0)[1] == 0

finish(export("warm"))
began = time.monotonic()
finish(export("timed"))
whole = time.monotonic() - began
for i in range(kills):
    share = 1.1 * (i + 0.5) / kills
    child = export(f"killed{i}")
    if i % 5:
        time.sleep(share * whole)
    else:  # the moment at which the name appears
        while not os.path.exists(f"{folder}/killed{i}/out"):
            pass
    done = os.waitpid(child, os.WNOHANG)[0]
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(i, round(share, 3), "done" if done else "killed", sorted(os.listdir(f"{folder}/killed{i}")), flush=True)
    if os.path.isdir(f"{folder}/killed{i}/out"):
        os.rename(f"{folder}/killed{i}/out", f"{folder}/killed{i}/first")
    finish(export(f"killed{i}"))
"""


@pytest.mark.parametrize(
    "what, kills",
    [
        ("export", 3),
        # `import` writes as `merge --checkpoint` does, and `merge` as `export`.
        ("merge --checkpoint", 3),
        *(pytest.param(what, 50, marks=pytest.mark.slow) for what in ("merge", "import", "merge --checkpoint")),
        pytest.param("export", 100, marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_all_or_nothing(tmp_path, what, kills):
    model = ModelConfig(2000, 256, 512, 8, 4, 2, 64)
    params = jax.jit(lambda: init_params(model, 0))()
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        checkpoints.save_params(params, {"model": to_tree(model)})
    if what.startswith("merge"):
        shutil.copytree(tmp_path / "checkpoint", tmp_path / "checkpoint2")
        recipe = MergeRecipe("linear", tuple(ModelRef(f"{tmp_path}/checkpoint{n}") for n in ("", "2")))
    if what == "merge":
        merge_to_hf(recipe, tmp_path / "right" / "out", "float32", max_shard_bytes=4e6)
    elif what == "merge --checkpoint":
        merge_to_checkpoint(recipe, tmp_path / "right" / "out")
    else:
        export_hf(tmp_path / "checkpoint", tmp_path / "right" / "out", dtype="float32", max_shard_bytes=4e6)
    if what == "import":
        (tmp_path / "right" / "out").rename(tmp_path / "hf")
        import_hf(tmp_path / "hf", tmp_path / "right" / "out")
    right = contents(tmp_path / "right" / "out")
    assert sum(name.endswith(".safetensors") or name.startswith("layers.") for name in right) > 4
    for i in range(kills):
        (tmp_path / f"killed{i}").mkdir()
    command = [sys.executable, "-c", EXPORT_AND_KILL, tmp_path / "checkpoint", tmp_path, str(kills), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    moments = done.stdout.splitlines()
    assert len(moments) == kills
    # Some were killed while files were being written, and the next export said what it removed.
    unfinished = [line for line in moments if ".partial" in line]
    assert len(unfinished) >= kills // 10, moments
    assert done.stderr.count("which a killed process left") == len(unfinished), done.stderr
    for i in range(kills):
        left = {path.name: contents(path) for path in (tmp_path / f"killed{i}").iterdir()}
        assert left.pop("out") == right
        assert left in ({}, {"first": right}), (moments[i], left.keys())


def test_a_writer_that_lives_keeps_its_draft(tmp_path, caplog):
    draft = tmp_path / ".out.1.partial"
    draft.mkdir()
    (tmp_path / ".other.1.partial").mkdir()
    lock = os.open(draft, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with atomic_directory(tmp_path / "out"):
        pass
    assert draft.exists() and not caplog.text
    os.close(lock)
    with atomic_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.1.partial", "out"]
    assert "removing .out.1.partial" in caplog.text


def test_a_file_that_could_not_be_written_leaves_no_draft(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "file") as file:
        file.write(b"half")
        raise OSError("full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def contents(folder: Path) -> dict:
    """Of a checkpoint what can be read of it: the names of its data files are random."""
    if not (folder / "checkpoints").is_dir():
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    step, model = step_directory(folder), stored_model(folder)
    arrays = {p.path: open_store(step, p.path, p.shape).read().result().tobytes() for p in parameter_table(model)}
    return {path.name: path.is_dir() for path in folder.iterdir()} | arrays | {"info": load_info(folder)}
