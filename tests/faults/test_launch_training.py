"""Real training, launched on the stand-in of a cloud: 2 workers, a process each, as one run."""

import filecmp
import os
import signal

import pytest
from fake_cloud import Cloud
from gcs_server import bucket, environment
from launched import RUN_URL, end, kill, nothing_is_left, run_directory, tpu, wait_for, write_run_file
from processes import ROOT, TINY, assert_same_bits, outcome, run, xla_flags

from easylm_mling.hf.exporting import export_hf
from easylm_mling.monitoring.metrics import read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.long]
ON_CPU = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": xla_flags(),
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
}


def trainer(run_dir) -> list[str]:
    settings = [*TINY, "mesh.cpu_devices=2", f"run_dir={run_dir}"]
    return ["python", "-m", "easylm_mling", "train", "configs/demo.yaml", *settings]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud").make(**ON_CPU)
    yield cloud
    for machine in [r["machine"] for r in cloud.state["resources"].values()]:
        cloud.wipe(machine)


def reached(cloud: Cloud, step: int) -> bool:
    metrics = run_directory(cloud) / "metrics.jsonl"
    return metrics.exists() and any(x["step"] >= step for x in read_metrics(metrics, "train"))


def test_training_ends_with_the_same_bits_whatever_befalls_it(cloud, tmp_path, monkeypatch):
    """A preemption with all disks wiped, a trainer killed, the launcher killed; then the model is on the laptop."""
    monkeypatch.chdir(ROOT)
    more = "files = data/sample\n[after]\nscript = tpu_scripts/export.sh\n"
    run_file = write_run_file(tmp_path, cloud, trainer(run_directory(cloud)), (), more, settle_seconds=150)
    first = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: reached(cloud, 2), 240)
    cloud.preempt("test", ["SUSPENDED"])
    wait_for(lambda: reached(cloud, 5), 240)
    worker = cloud.home("test", 1) / "easylm" / "test" / "trainer-pid"
    os.kill(int(worker.read_text().split()[0]), signal.SIGKILL)
    kill(first)
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"), seconds=500)
    assert "worker 1 ended with 137" in printed
    nothing_is_left(cloud)

    undisturbed = tmp_path / "undisturbed"
    run(undisturbed, 1)
    assert_same_bits(outcome(run_directory(cloud)), outcome(undisturbed))

    end(tpu(cloud, "cp", run_file, "run:hf", str(tmp_path / "model")))
    export_hf(undisturbed, tmp_path / "same", 10)
    names = [p.name for p in (tmp_path / "same").iterdir() if p.suffix in (".safetensors", ".json", ".model")]
    assert len(names) >= 4
    assert filecmp.cmpfiles(tmp_path / "same", tmp_path / "model", names, shallow=False)[0] == names


def test_a_run_in_a_bucket_from_the_first_command_to_the_model_on_the_laptop(tmp_path, monkeypatch):
    """Nothing is mounted: what the trainer mirrors, the logs, the launcher's state and the model lie in one bucket."""
    monkeypatch.chdir(ROOT)
    with bucket() as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        cloud = Cloud(tmp_path / "cloud").make(**ON_CPU, **environment(url))
        more = "files = data/sample\n[after]\nscript = tpu_scripts/export.sh\n"
        run_file = write_run_file(tmp_path, cloud, trainer(RUN_URL), (), more, mounted=False, settle_seconds=150)
        launcher = tpu(cloud, "run", run_file, "--keep-alive")
        wait_for(lambda: "of step 4" in end(tpu(cloud, "status", run_file)), 240)
        if "ACTIVE" in end(tpu(cloud, "status", run_file)):
            cloud.preempt("test", ["SUSPENDED"])
        end(launcher, seconds=500)
        nothing_is_left(cloud)
        status = end(tpu(cloud, "status", run_file))
        assert "ended: done" in status and "step        10" in status and "of step 10" in status
        assert "resumed from the checkpoint" in end(tpu(cloud, "logs", run_file, "-n", "1000"))
        end(tpu(cloud, "cp", run_file, "run:hf", str(tmp_path / "model")))
        undisturbed = tmp_path / "undisturbed"
        run(undisturbed, 1)
        assert_same_bits(outcome(RUN_URL), outcome(undisturbed))
        export_hf(undisturbed, tmp_path / "same", 10)
        weights = "model.safetensors"
        assert filecmp.cmp(tmp_path / "same" / weights, tmp_path / "model" / weights, shallow=False)


def test_a_stop_saves_and_the_next_run_goes_on_from_there(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_file = write_run_file(tmp_path, cloud, trainer(run_directory(cloud)), (), "files = data/sample\n")
    end(tpu(cloud, "run", run_file), seconds=300)
    wait_for(lambda: reached(cloud, 2), 240)
    stopped = end(tpu(cloud, "stop", run_file), seconds=300)
    assert stopped.count("ended with 42") in (0, 2)  # 0: all was done before
    end(tpu(cloud, "run", run_file, "--keep-alive"), seconds=300)
    nothing_is_left(cloud)
    lines = read_metrics(run_directory(cloud) / "metrics.jsonl", "train")
    assert [x["step"] for x in lines] == list(range(1, 11))
