"""What strangers may hand over, and what may not get out: configs, checkpoints, paths, and the secrets of the environment.

Configs are read in this process; what a checkpoint does is seen in one of its own, which says what code it tried to run and
by how much its memory grew.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from processes import ROOT, TINY, ends, printed, start

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.cli.main import main
from easylm_mling.config import ModelConfig, load, to_tree
from easylm_mling.data.mixture import COUNTERS
from easylm_mling.errors import ConfigError
from easylm_mling.training.state import init_params, init_state

DEMO = (ROOT / "configs/demo.yaml").read_text()


def with_budget(text: str) -> str:
    return DEMO.replace("450_000", text)


def bomb() -> str:
    """Ten lines that stand for 10^10 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    return "\n".join(lines)


CONFIGS = {
    "a bomb of aliases": (bomb(), "cannot be read as YAML"),
    "a tag that runs a command": (
        "run_dir: !!python/object/apply:os.system ['touch OWNED']",
        "could not determine a constr",
    ),
    "a tag that names a function": ("run_dir: !!python/name:os.system", "could not determine a constructor"),
    "a number of 5000 digits": (with_budget("9" * 5000), "a value of over 2000 letters"),
    "a number of 30 digits": (with_budget("9" * 30), "at most 64 bits"),
    "a hexadecimal number of 1500 digits": (with_budget("0x" + "f" * 1500), "at most 64 bits"),
    "a number without end": (with_budget("1e400"), "train.budget_tokens=inf must be a whole number"),
    "a number that is text": (with_budget("1" * 1900 + "x"), "must be a whole number"),
    "a million brackets": ("a: " + "[" * 400_000 + "]" * 400_000, "more than 20 levels"),
    "thirty levels": (DEMO + "\nmore: " + "{a: " * 30 + "1" + "}" * 30, "more than 20 levels"),
    "a file of two megabytes": ("x: '" + "y" * 2_000_000 + "'", "over 1 MB"),
    "no YAML": ("a: [", "cannot be read as YAML"),
    "a key that is a list": (DEMO + "\n? [a, b]\n: 2\n", "cannot be read as YAML"),
    "a secret of the environment": (DEMO.replace("runs/demo", "${oc.env:HF_TOKEN}"), "is not filled in here"),
    "a NUL in a path": (DEMO.replace("runs/demo", '"a\\0b"'), "NUL"),
    "a source named ../../x": (DEMO.replace("cc100-ja:", "../../x:"), "data.sources: the name '../../x'"),
    "a layer as wide as the world": (
        DEMO.replace("hidden_size: 128", "hidden_size: 1_000_000_000_000"),
        "at most 16777216",
    ),
    "a billion layers": (DEMO.replace("num_hidden_layers: 4", "num_hidden_layers: 1_000_000_000"), "at most 4096"),
    "a batch of a billion rows": (DEMO.replace("batch_size: 16", "batch_size: 1_600_000_000"), "at most 1048576"),
    "a million devices": (DEMO.replace("cpu_devices: 8", "cpu_devices: 1_000_000"), "between 0 and 1024"),
}


@pytest.mark.parametrize("text, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_from_a_stranger_costs_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as told:
        load(["config.yaml"])
    assert message in str(told.value) and "\n" not in str(told.value) and "hf_secret" not in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_an_override_is_the_text_that_it_is():
    read = lambda *given: load(["configs/demo.yaml"], given)  # noqa: E731
    os.chdir(ROOT)
    for text in ("a #b", "a: b", "a\nb", "*x", "@home", "%d", "it's", '"a" b', "한국어 $(touch OWNED) `x`"):
        if text != "a: b":
            assert read(f"run_dir={text}").run_dir == text
    with pytest.raises(ConfigError, match="run_dir="):
        read("run_dir=a: b")
    assert read("run_dir='a: b'").run_dir == "a: b" and read("train.budget_tokens=1e6").train.budget_tokens == 1_000_000
    assert read("init_from=null").init_from is None and read("mesh.cpu_devices=4").mesh.cpu_devices == 4


@pytest.mark.slow
def test_odd_names_of_folders_and_files(tmp_path, capsys):
    """Spaces, quotes, a line break, what a shell would run, letters of other scripts and markup, in every path that a run has."""
    odd = tmp_path / "a  b \"c\" 'd' $(touch OWNED) ; # %s 한국어 日本\nnext"
    shutil.copytree(ROOT / "data/sample", odd / "[/b]/data/sample")
    settings = [x for x in TINY if "mesh" not in x] + ["mesh.cpu_devices=0"]
    paths = [f"data.tokenizer={odd}/[/b]/data/sample/tokenizer/tokenizer.model"]
    for name, source in load([str(ROOT / "configs/demo.yaml")]).data.sources.items():
        paths.append(f"data.sources.{name}.paths={odd}/[/b]/{source.paths[0]}")
    command = ["train", str(ROOT / "configs/demo.yaml"), *settings, *paths, f"run_dir={odd}/run"]
    # Orbax would look for a run's checkpoints by a pattern: such a name is refused before the run begins.
    assert main([*command[:-1], f"run_dir={odd}/run [/b]", "train.stop_at_step=1"]) == 2
    assert "would be read as a pattern" in capsys.readouterr().err
    assert main([*command, "train.stop_at_step=1"]) == 0, capsys.readouterr().err
    assert main([*command, "train.stop_at_step=2", "train.digest_every_steps=1"]) == 0
    assert main(["export-hf", f"{odd}/run", f"{odd}/hf [/b]"]) == 0
    assert main(["summary", f"{odd}/run"]) == 0
    assert main(["data", "audit", f"{odd}/run", "--step", "2", "--row", "0"]) == 0
    assert main([*command, f"init_from={odd}/run", f"run_dir={odd}/next", "train.stop_at_step=1"]) == 0
    assert "resumed from the checkpoint of step 1" in capsys.readouterr().out
    assert sorted(p.name for p in odd.iterdir()) == ["[", "hf [", "next", "run"]
    assert [p.name for p in tmp_path.iterdir()] == [odd.name] and not list(Path.cwd().glob("OWNED"))


SECRETS = {
    "HF_TOKEN": "hf_canary0123456789",
    "WANDB_API_KEY": "wandb_canary0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws/canary0123456789",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/canary0123456789/key.json",
    "HTTPS_PROXY": "http://user:canary0123456789@proxy:1",
    "GITHUB_TOKEN": "ghp_canary0123456789",
}


@pytest.mark.faults
def test_no_secret_of_the_environment_is_written_anywhere(tmp_path):
    """Not by a run that goes well, by one that resumes, nor by ones that fail."""
    run_dir, other = tmp_path / "run", tmp_path / "other"
    for stop in ("2", "4"):
        [process] = start(run_dir, 1, f"train.stop_at_step={stop}", "train.digest_every_steps=1", environment=SECRETS)
        assert ends(run_dir, [process]) == [0], printed(run_dir)
    for wrong in ("run_dir=${oc.env:HF_TOKEN}", "data.sources.skypile.paths=s3://bucket/*.jsonl", "train.seed=1"):
        [process] = start(other if wrong.startswith("data") else run_dir, 1, wrong, environment=SECRETS)
        assert ends(run_dir, [process]) in ([1], [2])
    said = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(said) > 20
    for path in said:
        assert b"canary0123456789" not in path.read_bytes(), path


# What loads a checkpoint, in a process that tells on it.
VICTIM = """
import json, resource, sys
ran = []
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        ran.append(event)
sys.addaudithook(hook)
from easylm_mling.errors import is_expected, report_error
IMPORTS
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = 0
try:
    WORK
except BaseException as error:
    code = report_error(error) if is_expected(error) else "traceback: " + repr(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print("RESULT", json.dumps([code, ran, grown]))
"""
TAKE = """
from easylm_mling.inference.generate import load_model
from easylm_mling.hf.exporting import export_hf
"""
TAKEN = TAKE, "load_model(sys.argv[1]); export_hf(sys.argv[1], sys.argv[2])"
ONE_DEVICE = [
    *(x for x in TINY if "mesh" not in x),
    "mesh.data=1",
    "mesh.fsdp=1",
    "mesh.tensor=1",
    "mesh.cpu_devices=0",
]
RESUME = f"""
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import load
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import abstract_state
config = load([{str(ROOT / "configs/demo.yaml")!r}], {ONE_DEVICE})
state = abstract_state(config, make_mesh(config.mesh))
"""
RESUMED = RESUME, "Checkpoints(sys.argv[1]).restore_newest(state)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "imported"
    model = ModelConfig(512, 32, 64, 2, 4, 2, 8)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save_params(jax.jit(lambda: init_params(model, 0))(), {"model": to_tree(model)})
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a run that has done nothing yet."""
    directory, config = tmp_path_factory.mktemp("saved") / "run", load([str(ROOT / "configs/demo.yaml")], ONE_DEVICE)
    state = jax.jit(lambda: init_state(init_params(config.model, 0), config))()
    counters = {"lanes": np.zeros((8, 5, len(COUNTERS)), np.int64), "languages": np.zeros((50, 3), np.int64)}
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.save(state, counters, {"config": to_tree(config)}).ok
    return directory


def stored(directory, part="params"):
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/checkpoints/0/{part}/"}).result()


def edit_array(directory, change, name="embed_tokens", part="params"):
    key = f"{name}/zarr.json"
    header = json.loads(stored(directory, part).read(key).result().value)
    change(header)
    stored(directory, part).write(key, json.dumps(header).encode()).result()


def edit_info(directory, change):
    """As its own writer would: with a digest that fits."""
    path = directory / "checkpoints/0/info/_strings.json"
    kept = json.loads(path.read_text())
    text = change(json.loads(kept["json"]))
    path.write_text(json.dumps({"json": text, "digest": blake2b(text.encode(), digest_size=8).hexdigest()}))


def cut(header, shape, codecs=None):
    header["chunk_grid"]["configuration"]["chunk_shape"] = shape
    if codecs:
        header["codecs"] = codecs
    else:
        header["codecs"][0]["configuration"]["chunk_shape"] = shape


def packed_zeros(directory, shape, name="embed_tokens", part="params"):
    """131 kB that unpack to 4 GB."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}]
    edit_array(directory, lambda h: cut(h, shape, codecs), name, part)
    packer, zeros = zstandard.ZstdCompressor().compressobj(size=1 << 32), bytes(1 << 24)
    parts = [packer.compress(zeros) for _ in range(256)]
    chunk = "/".join([name, "c", *["0"] * len(shape)])
    stored(directory, part).write(chunk, b"".join(parts) + packer.flush()).result()


def array_in_the_info(directory):
    """8 GB of zeros that take no room, among its strings."""
    step = directory / "checkpoints/0"
    shutil.copytree(step / "params", step / "more")
    edit_array(directory, lambda h: h.update(shape=[1 << 16, 1 << 15]), part="more")
    listed = {p: json.loads((step / p / "_METADATA").read_text()) for p in ("info", "more")}
    name = next(n for n in listed["more"]["tree_metadata"] if "embed_tokens" in n)
    listed["info"]["tree_metadata"][name] = listed["more"]["tree_metadata"][name]
    shutil.copytree(step / "more", step / "info", dirs_exist_ok=True)
    (step / "info/_METADATA").write_text(json.dumps(listed["info"]))
    shutil.rmtree(step / "more")


def text_in(directory, name, old, new):
    path = directory / "checkpoints/0" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def crc32c(data: bytes) -> int:
    """Castagnoli's, of which a manifest's last four bytes are."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def reach_outside(directory):
    """The database's index says that its node lies four folders up."""
    params = directory / "checkpoints/0/params"
    [node] = (params / "d").iterdir()
    name = "../../../../" + "n" * 22
    shutil.move(node, params / name)
    manifest = (params / "manifest.ocdbt").read_bytes()[:-4].replace(f"d/{node.name}".encode(), name.encode())
    assert name.encode() in manifest
    (params / "manifest.ocdbt").write_bytes(manifest + struct.pack("<I", crc32c(manifest)))


def link_the_tokenizer(directory):
    (directory / "tokenizer").mkdir()
    (directory.parent / "secret").write_text("canary0123456789")
    (directory / "tokenizer/tokenizer.model").symlink_to(directory.parent / "secret")


HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
# What was done to it, and what is said; None: nothing, for it does no harm.
CHECKPOINTS = {
    "nothing": (lambda d: None, None),
    "an array of 4 EiB": (lambda d: edit_array(d, lambda h: h.update(shape=[1 << 40, 1 << 20])), "is ((1099511627776"),
    "an array of doubles": (lambda d: edit_array(d, lambda h: h.update(data_type="float64")), "'float64'), not"),
    "chunks of 4 GB": (lambda d: edit_array(d, lambda h: cut(h, [1 << 20, 1 << 10])), "cut in other chunks"),
    "4 GB packed into 131 kB": (lambda d: packed_zeros(d, [1 << 20, 1 << 10]), "do not trust it"),
    "the same in a chunk that looks well": (lambda d: packed_zeros(d, [512, 32]), "do not trust it"),
    "code as the reader of its parts": (lambda d: text_in(d, "_CHECKPOINT_METADATA", HANDLER, "os.system"), None),
    "code as the type of its values": (lambda d: text_in(d, "params/_METADATA", "jax.Array", "os.system"), None),
    "a model of 4 TB": (
        lambda d: edit_info(
            d, lambda i: json.dumps(i | {"model": i["model"] | {"vocab_size": 1 << 24, "hidden_size": 1 << 16}})
        ),
        "not ((16777216, 65536)",
    ),
    "a model of text": (
        lambda d: edit_info(d, lambda i: json.dumps(i | {"model": i["model"] | {"vocab_size": "$(touch OWNED)"}})),
        "must be a whole number",
    ),
    "info that is nested without end": (
        lambda d: edit_info(d, lambda i: "[" * 200_000 + "]" * 200_000),
        "cannot be read",
    ),
    "8 GB in its info": (array_in_the_info, None),
    "info that is no info": (lambda d: edit_info(d, lambda i: "[1]"), "cannot be read"),
    "info without a model": (lambda d: edit_info(d, lambda i: json.dumps({"format": i["format"]})), "names no model"),
    "an index that reaches outside": (reach_outside, "Invalid key"),
    "a tokenizer that is a link to a secret": (link_the_tokenizer, "is a link to a file elsewhere"),
    "a step that is a link elsewhere": (lambda d: (d / "checkpoints/7").symlink_to("/etc"), "error: "),
}


MOMENT = ("optimizer.0.mu.embed_tokens", "training")
# The same for a resume, which also reads the optimizer's state and what was consumed.
RUNS = {
    "nothing": (lambda d: None, None),
    "a parameter of 4 EiB": (lambda d: edit_array(d, lambda h: h.update(shape=[1 << 40, 1 << 20])), "is ((1099511627776"),
    "a moment of 4 EiB": (
        lambda d: edit_array(d, lambda h: h.update(shape=[1 << 40, 1 << 20]), *MOMENT), "is ((1099511627776"
    ),
    "a moment of chunks of 4 GB": (
        lambda d: edit_array(d, lambda h: cut(h, [1 << 20, 1 << 10]), *MOMENT), "do not trust it"
    ),
    "a moment of 4 GB packed into 131 kB": (lambda d: packed_zeros(d, [1 << 20, 1 << 10], *MOMENT), "do not trust it"),
    "a step that is a double": (lambda d: edit_array(d, lambda h: h.update(data_type="float64"), "step", "training"), "float64"),
    "counters of 7 TB": (
        lambda d: edit_array(d, lambda h: h.update(shape=[1 << 34, 5, 11]), "lanes", "data"), "not counters"
    ),
    "counters of 4 GB packed": (lambda d: packed_zeros(d, [1 << 20, 5, 100], "lanes", "data"), "do not trust it"),
    "8 GB in its info": (array_in_the_info, None),
    "info that is nested without end": (CHECKPOINTS["info that is nested without end"][0], "cannot be read"),
    "code as the reader of its parts": (CHECKPOINTS["code as the reader of its parts"][0], None),
}  # fmt: skip


def assault(checkpoint, tmp_path, attack, victim):
    """The exit code and what was said, after an attack that ran no code and filled no memory."""
    directory, (imports, work) = tmp_path / "inside" / "checkpoint", victim
    shutil.copytree(checkpoint, directory)
    attack(directory)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    code = VICTIM.replace("IMPORTS", imports).replace("WORK", work)
    command = [sys.executable, "-c", code, str(directory), str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    code, ran, megabytes = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert ran == [] and megabytes < 300, done.stdout
    return code, done.stdout + done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("attack, message", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_from_a_stranger_runs_nothing_and_fills_nothing(checkpoint, tmp_path, attack, message):
    code, said = assault(checkpoint, tmp_path, attack, TAKEN)
    # Nothing is exported of what is refused, and nothing else appears.
    assert code == (0 if message is None else 2) and (message or "") in said, said
    assert {p.name for p in tmp_path.iterdir()} == {"inside", *(["hf"] if code == 0 else [])}


@pytest.mark.faults
@pytest.mark.parametrize("attack, message", RUNS.values(), ids=RUNS)
def test_nor_does_a_run_from_a_stranger_that_is_resumed(saved, tmp_path, attack, message):
    code, said = assault(saved, tmp_path, attack, RESUMED)
    assert code == (0 if message is None else 3) and (message or "") in said, said
    assert {p.name for p in tmp_path.iterdir()} == {"inside"}
