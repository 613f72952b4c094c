"""A run directory in a bucket: the same bits as on a disk, whatever is killed, wiped, slow, flaky or gone (row 7 of the table)."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from gcs_server import BUCKET, WAYS_TO_FAIL, Proxy, bucket, environment
from processes import ROOT, assert_same_bits, ends, outcome, printed, run, start, train_here, wait_for_step
from rich.console import Console
from safetensors.torch import load_file, save_file

from easylm_mling.checkpoint.layout import committed_steps, newest_step
from easylm_mling.data.tokenization.files import copy_tokenizer
from easylm_mling.data.tools.audit import audit
from easylm_mling.errors import ConfigError
from easylm_mling.hf.exporting import export_hf, note_export
from easylm_mling.hf.importing import import_hf
from easylm_mling.inference.generate import load_model
from easylm_mling.monitoring.events import read_event_log
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.run.summary import print_summary
from easylm_mling.storage.object_store import Bucket, Mirror, local_folder, small_files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run_dir)
    return outcome(run_dir)


@pytest.fixture
def proxy(tmp_path_factory, monkeypatch):
    with bucket() as url:
        proxy = Proxy(url)
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield proxy


def assert_exports_are_noted(run_dir, folder):
    """But not while the run is trained, for the trainer's metrics are the run's."""
    there = Bucket(run_dir)
    before = there.read("metrics.jsonl")
    there.write_all({"lease": b"{}"})
    assert not note_export(run_dir, folder, 10, "bfloat16") and there.read("metrics.jsonl") == before
    there.write_all({"lease": None})
    assert note_export(run_dir, folder, 10, "bfloat16")
    after = there.read("metrics.jsonl")
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    [noted] = read_metrics(small_files(run_dir) / "metrics.jsonl", "export")
    assert (noted["step"], noted["path"], noted["dtype"]) == (10, str(folder), "bfloat16")
    assert not there.replace("metrics.jsonl", before, b"") and there.read("metrics.jsonl") == after


@pytest.mark.faults
def test_a_run_in_a_bucket_has_the_same_bits(undisturbed, proxy, tmp_path):
    """Stopped, its machine's disk wiped, and gone on elsewhere; all that a run writes is in the bucket."""
    run_dir = f"gs://{BUCKET}/a folder/run"
    train_here(run_dir, "train.stop_at_step=5")
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    assert "resumed from the checkpoint of step 5" in train_here(run_dir)
    assert_same_bits(outcome(run_dir), undisturbed)
    names = Bucket(run_dir).names()
    assert {"config.yaml", "catalog.json", "estimates.json", "ledger.json", "metrics.jsonl", "data_states/5.npz",
            "tokenizer/tokenizer.model"} < set(names)  # fmt: skip
    assert {n.split("/")[1] for n in names if n.startswith("checkpoints/")} == {"8", "10"}
    assert "lease" not in names
    print_summary(run_dir, Console(file=io.StringIO()))
    assert len(audit(run_dir, 7)) == 8
    (loaded,) = [load_model(run_dir)[2]]
    assert loaded.hidden_size == 32
    assert_exports_are_noted(run_dir, tmp_path)
    with pytest.raises(ConfigError, match="belongs to a run with another config: optimizer.learning_rate was"):
        train_here(run_dir, "optimizer.learning_rate=1")
    Bucket(f"gs://{BUCKET}/other").write_all({"mine": b""})
    with pytest.raises(ConfigError, match=f"run_dir=gs://{BUCKET}/other is not empty and holds no run"):
        train_here(f"gs://{BUCKET}/other")


def test_a_bucket_that_is_not_there_is_told_at_once(proxy):
    with pytest.raises(ConfigError, match=r"run_dir=gs://nobody/run: cannot be (read|written) \(.*\); see that "):
        train_here("gs://nobody/run")
    with pytest.raises(ConfigError, match="name a bucket and a folder in it"):
        train_here("gs://nobody")


@pytest.mark.faults
def test_a_damaged_step_in_a_bucket_is_set_aside(undisturbed, proxy):
    run_dir = f"gs://{BUCKET}/run"
    train_here(run_dir, "train.stop_at_step=8")
    there = Bucket(run_dir)
    contents = there.read_all([n for n in there.names() if n.startswith("checkpoints/8/params/")])
    name = max(contents, key=lambda n: len(contents[n]))
    flipped = bytearray(contents[name])
    flipped[len(flipped) // 2] ^= 4
    there.write_all({name: bytes(flipped)})
    assert "the checkpoint of step 8 is damaged and set aside" in train_here(run_dir)
    assert f"set-aside/checkpoint-8-damaged/{name.removeprefix('checkpoints/8/')}" in there.names()
    assert_same_bits(outcome(run_dir), undisturbed)


def test_an_answer_that_is_cut_off_in_its_headers_is_no_empty_object(proxy):
    there = Bucket(f"gs://{BUCKET}/run")
    there.write_all({"format.json": b'{"format": 1}', "empty": b""})
    proxy.ways, proxy.fail_every = WAYS_TO_FAIL[2:], 2
    for _ in range(4):
        assert there.read("format.json") == b'{"format": 1}'
    assert proxy.failed > 1
    proxy.fail_every = 0
    assert there.read("empty") == b"" and there.read("none") is None


def test_only_what_has_changed_is_pushed_and_logs_grow(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("easylm_mling.storage.object_store._WHOLE", 10)
    there, folder = Bucket(f"gs://{BUCKET}/run"), tmp_path / "mirror"
    mirror = Mirror(there, folder)
    assert mirror.pull(to_train=True) == []
    (folder / "config.yaml").write_text("a: 1")
    (folder / "states").mkdir()
    (folder / "states" / "1.npz").write_bytes(b"1")
    with open(folder / "metrics.jsonl", "a") as log:
        for line in range(6):
            log.write(f'{{"line": {line}}}\n{{"cut sh')
            log.flush()
            mirror.push()
            log.write('ort": 1}\n')
            log.flush()
    assert there.read("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes().rpartition(b'{"cut')[0]
    asked = proxy.asked
    mirror.push()
    assert proxy.asked > asked
    asked = proxy.asked
    mirror.push()
    assert proxy.asked == asked
    assert there.read("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    (folder / "states" / "1.npz").unlink()
    mirror.push()
    assert there.names() == ["config.yaml", "metrics.jsonl"]
    assert small_files(there.url).joinpath("metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    there.write_all({"a//b": b""})
    with pytest.raises(ConfigError, match="strange name"):
        mirror.pull()


@pytest.mark.faults
def test_models_come_from_and_go_to_a_bucket(proxy, hf_source, tmp_path):
    imported = f"gs://{BUCKET}/imported"
    copy_tokenizer(ROOT / "data/sample/tokenizer", hf_source)
    import_hf(hf_source, imported)
    with pytest.raises(ConfigError, match="already holds something"):
        import_hf(hf_source, imported)
    export_hf(imported, tmp_path / "exported")
    import_hf(hf_source, tmp_path / "imported")
    there, here = (jax.tree.leaves(load_model(place)[1]) for place in (imported, tmp_path / "imported"))
    assert there and all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    export_hf(tmp_path / "imported", tmp_path / "beside")
    for file in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "exported" / file).read_bytes() == (tmp_path / "beside" / file).read_bytes()


@pytest.mark.faults
def test_an_import_into_a_bucket_is_committed_last(proxy, hf_source, tmp_path):
    """Killed before, whatever was written is no checkpoint; an error of the weights leaves nothing."""
    copy_tokenizer(ROOT / "data/sample/tokenizer", hf_source)
    target = f"gs://{BUCKET}/imported"
    for wanted in ("/params/manifest.ocdbt", "/params/_METADATA", "/info/_strings.json"):
        command = [sys.executable, "-m", "easylm_mling", "import-hf", str(hf_source), target]
        proxy.lost = b"commit_success"
        with subprocess.Popen(command, cwd=ROOT) as child:
            late = time.monotonic() + 120
            while not any(name.endswith(wanted) for name in Bucket(target).names()):
                assert child.poll() is None and time.monotonic() < late
            child.kill()
        proxy.lost = b""
        while proxy.serving:  # what the killed process was sending still arrives
            assert time.monotonic() < late
        assert Bucket(target).names() and committed_steps(target) == []
        with pytest.raises(ConfigError, match="no checkpoint here"):
            export_hf(target, tmp_path / "exported")
        with pytest.raises(ConfigError, match="already holds something"):
            import_hf(hf_source, target)
        # The server's listings are of the whole bucket.
        Bucket(target).write_all(dict.fromkeys(Bucket(target).names()))
    tensors = load_file(hf_source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    shutil.copytree(hf_source, tmp_path / "nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="model.norm.weight holds NaN"):
        import_hf(tmp_path / "nan", target)
    assert Bucket(target).names() == []


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_two_processes_train_in_a_bucket_and_one_is_killed(proxy, tmp_path, killed):
    """The other ends, and both go on together, on new machines, from what the bucket holds."""
    url, run_dir, often = f"gs://{BUCKET}/run", tmp_path / "run", "checkpoint.every_steps=2"
    processes = start(run_dir, 2, often, f"run_dir={url}")
    # The save of step 4 has begun, so the one of step 2 is done.
    wait_for_step(processes, local_folder(url, 0), 5)
    processes[killed].kill()
    codes = ends(run_dir, processes)
    # 85: it found out itself; SIGABRT: JAX's coordination did.
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] in (85, -signal.SIGABRT), printed(run_dir)
    step = newest_step(url)
    assert 2 <= step < 10
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    run(run_dir, 2, often, f"run_dir={url}")
    assert f"resumed from the checkpoint of step {step}" in printed(run_dir)
    assert "lease" not in Bucket(url).names()
    assert [e["event"] for e in read_event_log(small_files(url) / "events.jsonl")][-1] == "done"
    run(tmp_path / "undisturbed", 1, often)
    assert_same_bits(outcome(url), outcome(tmp_path / "undisturbed"))


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_killed_again_and_again_in_a_bucket(proxy, tmp_path, count):
    """kill -9 at random moments, and in between the disk is wiped: the bits of a run on a disk."""
    run(tmp_path / "undisturbed", count, "checkpoint.every_steps=2")
    url, rng, codes, killed = f"gs://{BUCKET}/run", random.Random(count), [], 0
    while codes != [0] * count:
        processes = start(tmp_path / "run", count, "checkpoint.every_steps=2", f"run_dir={url}", "--wait-seconds=60")
        if killed < 4:
            wait_for_step(processes, local_folder(url, 0), 2 * killed + 2)
            time.sleep(rng.uniform(0, 0.5))
            rng.choice(processes).kill()
        codes = ends(tmp_path / "run", processes)
        killed += -signal.SIGKILL in codes
        assert set(codes) <= {0, 85, -signal.SIGKILL, -signal.SIGABRT}, printed(tmp_path / "run")
        if killed % 2:
            shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    assert killed >= 2
    assert_same_bits(outcome(url), outcome(tmp_path / "undisturbed"))


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("ways", [WAYS_TO_FAIL[:2], WAYS_TO_FAIL])
def test_slow_and_flaky_storage_costs_time_only(undisturbed, proxy, ways):
    """One request of ten fails. Where an answer is lost a save may fail, which is told; another comes."""
    run_dir = f"gs://{BUCKET}/run"
    proxy.ways, proxy.seconds, proxy.fail_every = ways, 0.02, 10
    train_here(run_dir, "train.stop_at_step=5", "checkpoint.max_failed=9")
    train_here(run_dir, "checkpoint.max_failed=9")
    assert proxy.failed > 50
    events = read_event_log(small_files(run_dir) / "events.jsonl")
    failed = [event for event in events if event["event"] == "save_failed"]
    assert len(failed) == 0 or ways is WAYS_TO_FAIL
    proxy.fail_every = 0
    assert_same_bits(outcome(run_dir), undisturbed)


@pytest.mark.faults
@pytest.mark.long
def test_storage_that_is_gone_stops_the_run_clearly_and_in_time(undisturbed, proxy, tmp_path):
    url = f"gs://{BUCKET}/run"
    settings = ("checkpoint.every_steps=1", f"run_dir={url}", "checkpoint.stuck_minutes=0.25")
    processes = start(tmp_path / "run", 1, *settings)
    wait_for_step(processes, local_folder(url, 0), 3)
    proxy.gone, since = True, time.monotonic()
    assert ends(tmp_path / "run", processes) == [85]
    assert time.monotonic() - since < 60
    assert "(checkpoint.stuck_minutes)" in printed(tmp_path / "run")
    proxy.gone = False
    run(tmp_path / "run", 1, *settings)
    run(tmp_path / "undisturbed", 1)
    assert_same_bits(outcome(url), outcome(tmp_path / "undisturbed"))
