"""The manifests for SkyPilot and GKE, read to the letter."""

import re
from pathlib import Path

import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from easylm_mling import errors as exits
from easylm_mling.config import load

ROOT = Path(__file__).parent.parent
OTHER = ROOT / "tpu_scripts" / "other"


def known_keys(given, read, path=""):
    """Every key that is given was understood; of a list, every item's."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in read, f"{path}.{key} is no key of a JobSet"
            known_keys(value, read[key], f"{path}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(read)
        for one, other in zip(given, read, strict=True):
            known_keys(one, other, path)
    else:
        assert given == read, path


def test_the_jobset_is_one_to_the_clients_own_models():
    given = yaml.safe_load((OTHER / "gke-jobset.yaml").read_text())
    known_keys(given, JobsetV1alpha2JobSet.from_dict(given).to_dict())
    job = given["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    # One pod a host: a v4-64 is 2 x 4 x 4 chips.
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 2 * 4 * 4
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [exits.WRONG_INPUT, exits.NO_CHECKPOINT]
    read(container["args"])


def test_the_skypilot_task_restarts_what_can_be_restarted():
    """(Its own parser was asked by hand, SkyPilot 0.14.1: it brings too much for a test. This looks at the same keys.)"""
    task = yaml.safe_load((OTHER / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "resources", "workdir", "secrets", "setup", "run"}
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [exits.PREEMPTED, exits.STUCK]
    read(re.findall(r"(?:configs/\S+|[a-z_.]+=\S+)", task["run"]))


def read(arguments: list[str]):
    """The trainer takes them."""
    files = [str(ROOT / a) for a in arguments if "=" not in a]
    config = load(files, [a for a in arguments if "=" in a])
    assert config.mesh.slice == "v4-64" and config.run_dir.startswith("gs://")
