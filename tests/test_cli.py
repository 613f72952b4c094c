"""The command line: light, with a clear line for what a user gets wrong, and true to the config's dataclasses."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from easylm_mling import __version__
from easylm_mling.cli.main import main
from easylm_mling.config import ConfigError, RunConfig, load, load_mixer
from easylm_mling.config.describe import known_keys, markdown
from easylm_mling.errors import DataError, EasylmError, TrainingStopped, crash_file, report_error

ROOT = Path(__file__).parent.parent
HEAVY = (
    "jax", "flax", "optax", "orbax", "pyarrow", "tensorstore", "sentencepiece", "transformers", "numpy", "matplotlib", "rich",
)  # fmt: skip


MISSPELT = ["configs/demo.yaml", "train.batchsize=8"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config"], ["train", *MISSPELT], ["plan", *MISSPELT], ["data", "inspect", *MISSPELT]]
)
def test_help_and_a_misspelt_key_load_nothing_heavy(arguments):
    script = f"""
import sys
from easylm_mling.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"easylm-mling {__version__}\n"


def test_config_explains_a_key_a_section_and_what_is_misspelt(capsys):
    assert main(["config", "train.stuck_minutes"]) == 0
    text = capsys.readouterr().out
    assert (
        "exit code 85" in text
        and "number, in minutes; default: 30.0" in text
        and "may change when a run resumes" in text
    )
    assert main(["config", "mesh"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "mesh", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.cpu_devices", "mesh.slice",
    ]  # fmt: skip
    assert main(["config", "train.batchsize"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'train.batchsize'; did you mean 'train.batch_size'?\n"


def test_config_says_what_a_key_affects_and_whether_it_must_be_given(capsys):
    for key, *texts in (
        ("run_dir", "must be given"),
        ("train.budget_tokens", "or give budget_epochs", "with --change KEY=VALUE"),
        ("data.lanes", "is fixed for a run's life: every lane reads its own blocks"),
        ("train.batch_size", "with --change KEY=VALUE"),
        ("train.stop_at_step", "the step does not depend on it"),
        ("train.compiler_flags", "default: {}"),
        ("log.wandb", "default: ''"),
        ("data.sources.NAME.weight", "with --accept-data-change"),
        ("data.sources", "In YAML a source may be a group instead"),
    ):
        assert main(["config", key]) == 0
        printed = capsys.readouterr().out
        assert all(text in printed for text in texts), printed


def test_data_alone_is_inspected_and_is_part_of_a_whole_config(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    mine = "configs/my-corpus.yaml"
    assert len(Path(mine).read_text().splitlines()) <= 12
    assert main(["data", "inspect", mine, "train.batch_size=4", "data.sequence_length=256", "--json"]) == 0
    inspection = json.loads(capsys.readouterr().out)
    everything = sum(source["tokens"] for source in inspection["sources"].values())
    assert 0 <= inspection["budget"] - everything < 4 * 256, "without a budget, all data once"
    whole = load(["configs/model/gemma-2b.yaml", mine, "configs/run/v6e-8.yaml"])
    assert list(whole.data.sources) == list(inspection["sources"]) and whole.mixer.budget_tokens == 10**10


@pytest.mark.parametrize(
    "override, message",
    [
        ("train=5", "train: expected `key: value` lines, found 5"),
        ("train.batch_size=0", "train.batch_size=0 must be positive"),
        ("data.lanes=7", "train.batch_size=64 must be a multiple of data.lanes=7"),
        ("optimizer.beta=1", "unknown key 'optimizer.beta'; did you mean 'beta2'?"),
        ("modell.head_dim=1", "unknown key 'modell'; did you mean 'model'?"),
    ],
)
def test_data_alone_is_checked_with_all_that_is_given(override, message):
    with pytest.raises(ConfigError) as error:
        load_mixer([str(ROOT / "configs/my-corpus.yaml")], [override])
    assert message in str(error.value)


def test_every_key_says_what_it_is():
    assert not [name for name, key in known_keys().items() if not key.setting.help]
    sections = [RunConfig, *typing.get_type_hints(RunConfig).values()]
    names = {f.name for s in sections if dataclasses.is_dataclass(s) for f in dataclasses.fields(s)}
    assert {name.rpartition(".")[2] for name in known_keys()} >= names


def test_the_page_of_config_keys_is_what_the_dataclasses_say():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown(), (
        "run: easylm-mling config --markdown > docs/config.md"
    )


def test_an_unexpected_error_keeps_its_traceback_and_one_of_ours_is_a_line(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError) as caught, crash_file(tmp_path):
        1 / 0  # noqa: B018
    assert report_error(caught.value) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: unexpected ZeroDivisionError: division by zero; please report it")
    (file,) = tmp_path.glob("crash-*.txt")
    assert any("1 / 0" in line for line in rest) and "1 / 0" in file.read_text() and str(file) in rest[-1]
    for error, code in ((DataError("bad"), 2), (TrainingStopped("stop"), 1), (FileNotFoundError("gone"), 1)):
        with pytest.raises((EasylmError, OSError)) as caught, crash_file(tmp_path):
            raise error
        assert report_error(caught.value) == code
        assert capsys.readouterr().err == f"error: {error}\n"
    assert list(tmp_path.glob("crash-*.txt")) == [file]


def test_no_address_in_a_crash_file_keeps_its_key(tmp_path):
    with pytest.raises(TypeError), crash_file(tmp_path):
        raise TypeError("https://me:secret@host/a?token=secret, with url: /b?X-Signature=secret")
    (file,) = tmp_path.glob("crash-*.txt")
    last = file.read_text().splitlines()[-1]
    assert "https://...@host/a?..." in last and "/b?..." in last and "secret" not in last
