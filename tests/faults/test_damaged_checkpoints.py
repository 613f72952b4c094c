"""A checkpoint that is not what was saved is noticed, set aside and told (row 5); the run goes on from the one before, to the bit."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import assert_same_bits, outcome, train_here

from easylm_mling.digest import digests
from easylm_mling.exits import NO_CHECKPOINT, NoUsableCheckpoint, tell

# Orbax leaves its coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run_dir)
    return outcome(run_dir)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "a bit of a parameter": lambda step: flip(largest(step / "params")),
    "a bit of a moment": lambda step: flip(largest(step / "training")),
    "a bit of what was consumed": lambda step: flip(largest(step / "data" / "ocdbt.process_0")),
    "a bit of the info": lambda step: flip(step / "info" / "_strings.json"),
    "a file cut short": lambda step: os.truncate(largest(step / "params"), 10_000),
    "a file gone": lambda step: (step / "training" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_step_before_is_taken_aloud(undisturbed, tmp_path, damage):
    run_dir = tmp_path / "run"
    train_here(run_dir, "train.stop_at_step=8")
    damage(run_dir / "checkpoints" / "8")
    said = train_here(run_dir)
    assert (
        "the checkpoint of step 8 is damaged and set aside" in said and "resumed from the checkpoint of step 4" in said
    )
    assert [p.name for p in (run_dir / "set-aside").iterdir()] == ["checkpoint-8-damaged"]
    assert_same_bits(outcome(run_dir), undisturbed)


def test_without_a_whole_checkpoint_nothing_begins_anew(tmp_path, capsys):
    run_dir = tmp_path / "run"
    train_here(run_dir, "train.stop_at_step=8")
    for step in ("4", "8"):
        flip(largest(run_dir / "checkpoints" / step / "params"))
    with pytest.raises(
        NoUsableCheckpoint, match=r"every checkpoint is damaged \(step 8: \['params'\]\['embed_tokens'\] is not"
    ) as told:
        train_here(run_dir)
    assert tell(told.value) == NO_CHECKPOINT == 3
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["4", "8"]


def test_a_digest_is_of_every_bit_and_of_no_mesh():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 16, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    same = {
        digests({"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))})["['x']"]
        for spec in ((), ("a", "b"), (("a", "b"),), (None, "a", "b"))
    }
    assert len(same) == 1
    bits = x.view(np.uint32).reshape(-1)
    for _ in range(20):
        place, bit = rng.integers(bits.size), rng.integers(32)
        bits[place] ^= np.uint32(1 << bit)
        assert digests({"x": jnp.asarray(x)})["['x']"] not in same
        bits[place] ^= np.uint32(1 << bit)
    assert digests({"x": jnp.asarray(x[::-1])})["['x']"] not in same
    assert digests({"x": jnp.asarray(x)})["['x']"] in same
    half = jnp.asarray(x, jnp.bfloat16)
    assert digests([half]) != digests([half.at[0, 0, 0].multiply(-1)]) and digests([x]) != digests([x[::-1]])
