"""The launcher killed at random moments, machines preempted in between, and services that fail: it all comes to one end."""

import random
import time

import pytest
from fake_cloud import NO_CAPACITY, Cloud
from launched import curve, end, expected_curve, kill, nothing_is_left, run_directory, stand_in, tpu

pytestmark = [pytest.mark.faults, pytest.mark.long]


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(tmp_path, seed):
    rng, cloud = random.Random(seed), Cloud(tmp_path / "cloud").make()
    with cloud.changing() as state:
        state["creations"] = [{"refuse": NO_CAPACITY}, {"states": ["ACCEPTED", "PROVISIONING", "ACTIVE"]}]
    run_file = stand_in(tmp_path, cloud, 40, STEP_SECONDS=0.3)
    for _ in range(12):
        launcher = tpu(cloud, "run", run_file, "--keep-alive")
        time.sleep(rng.uniform(0, 5))
        kill(launcher)
        resources = cloud.state["resources"]
        if rng.random() < 0.3 and "test" in resources:
            cloud.preempt("test", rng.choice([["SUSPENDED"], ["FAILED"], ["SUSPENDING", "SUSPENDED"]]))
        with cloud.changing() as state:
            for what in ("describe_fails", "ssh_refused", "storage_fails"):
                state[what] = rng.choice([0, 0, 0, 1])
    with cloud.changing() as state:
        state["storage_fails"] = 0
    end(tpu(cloud, "run", run_file, "--keep-alive"), seconds=240)
    assert curve(cloud) == expected_curve(40)
    nothing_is_left(cloud)
    # Not one attempt's log was written over by a later one: each begins with its own number.
    for log in (run_directory(cloud) / "logs").glob("*/worker-0.log"):
        assert f"== attempt {int(log.parent.name.removeprefix('attempt-'))} on worker 0" in log.read_text()
