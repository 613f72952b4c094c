"""The import direction of the house, held by reading every import."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "easylm_mling"

# What each module may import of this package, at most. Entries (train, generate, __main__ ...) may import anything below them.
# fmt: off
MAY_IMPORT = {
    "config.basics": set(),
    "config.model": {"config.basics"},
    "config.data": {"config.basics"},
    "config.run": {"config.basics", "config.data", "config.model"},
    "config.loading": {"config.basics", "config.run"},
    "atomic": {"config"},
    "params": {"config"},
    "sharding": {"config", "params"},
    "attention": {"sharding"},
    "compiler_flags": set(),
    "model_flops": {"config", "params"},
    "splash": {"attention"},
    "embedding": {"sharding"},
    "model": {"attention", "config", "embedding", "gated", "sharding"},
    "gated": set(),
    "loss": {"attention", "sharding"},
    "optimizer": {"config", "params"},
    "guard": set(),
    "step": {"attention", "compiler_flags", "config", "guard", "loss", "model", "optimizer", "sharding", "splash"},
    "compiling": {"config", "step"},
    "digest": set(),
    "bucket": {"config", "data.files"},
    "lease": {"config", "data.files", "exits"},
    "checkpoint": {
        "bucket", "config", "data.files", "digest", "exits", "processes", "step", "step_folders", "stopping", "stored",
    },
    "step_folders": {"bucket", "config"},
    "stored": {"bucket", "config", "data.mixture", "step_folders"},
    "exits": set(),
    "stopping": {"console", "exits"},
    "processes": {"config", "data.mixture", "data.quarantine", "exits", "sharding"},
    "replay": {"config", "digest", "exits", "metrics", "processes", "rewind", "run_data", "step"},
    "rewind": {"checkpoint", "config", "console", "events", "metrics", "processes", "run_dir"},
    "run_dir": {"atomic", "bucket", "config", "hf.files", "lease"},
    "records": set(),
    "sinks": {"config"},
    "metrics": {"records", "sinks"},
    "events": {"records"},
    "console": set(),
    "profile": {"config"},
    "speed": {"config", "model_flops", "plan.slices"},
    "watch": {
        "config", "console", "events", "guard", "metrics", "plan.calibrate", "processes", "profile", "run_dir", "sinks", "speed",
        "step", "step_folders",
    },
    "run_data": {
        "atomic", "config", "data.catalog", "data.changes", "data.estimates", "data.ledger", "data.mixture", "data.states",
        "data.tokenizer", "data.weights", "run_dir",
    },
    "report.curve": set(),
    "report.collect": {"bucket", "config", "events", "records", "report.curve"},
    "report.svg": {"console", "report.curve"},
    "report.page": {
        "atomic", "bucket", "console", "events", "model_flops", "params", "report.collect", "report.svg",
    },
    "summary": {"bucket", "config", "console", "data.mixture", "metrics", "run_data", "stored"},
    "data.files": {"config"},
    "data.lines": {"data.files"},
    "data.tables": {"data.files"},
    "data.readers": {"config", "data.files", "data.lines", "data.tables"},
    "data.layouts": {"config", "data.files", "data.lines", "data.readers", "data.tables"},
    "data.listing": {"config", "data.files", "data.layouts"},
    "data.catalog": {"atomic", "config", "data.files", "data.layouts", "data.listing", "data.readers"},
    "data.quarantine": {"atomic", "data.mixture", "data.readers", "records"},
    "hf.card": {
        "config", "console", "data.catalog", "data.mixture", "hf.config", "hf.plot", "metrics", "params", "run_data",
        "stored",
    },
    "hf.plot": set(),
    "hf.config": {"config"},
    "hf.files": {"config"},
    "hf.hub": {"config", "data.files", "hf.files"},
    "hf.vocabulary": {"config"},
    "data.encoder": set(),
    "data.tokenizer": {"config", "data.encoder"},
    "data.weights": {"config", "data.catalog"},
    "data.blocks": {"config", "data.catalog", "data.readers", "data.weights"},
    "data.estimates": {"atomic", "data.blocks", "data.catalog", "data.tokenizer", "data.weights"},
    "data.mixture": {"config", "data.blocks", "data.weights"},
    "data.states": {"atomic", "config", "data.mixture"},
    "data.ledger": {"data.catalog", "data.estimates", "data.mixture", "data.weights"},
    "data.forecast": {"config", "data.blocks", "data.catalog", "data.weights"},
    "data.inspect": {
        "config", "console", "data.catalog", "data.estimates", "data.forecast", "data.tokenizer", "data.weights",
    },
    "data.audit": {
        "bucket", "config", "data.blocks", "data.catalog", "data.estimates", "data.loader", "data.mixture", "data.states",
        "data.streams", "data.tokenizer", "data.weights",
    },
    "data.changes": {"data.catalog", "data.mixture", "data.weights"},
    "data.cache": {"atomic", "data.blocks", "data.readers", "data.tokenizer"},
    "data.streams": {"config", "data.blocks", "data.cache", "data.mixture", "data.tokenizer"},
    "plan.slices": {"config"},
    "plan.hlo": set(),
    "plan.buffers": {"plan.hlo"},
    "plan.kernels": {"plan.hlo", "plan.slices"},
    "plan.schedule": {"plan.hlo", "plan.kernels", "plan.slices"},
    "plan.compiled": {"config", "plan.buffers", "plan.hlo", "plan.slices", "sharding", "step"},
    "plan.measure": {
        "atomic", "config", "plan.buffers", "plan.compiled", "plan.hlo", "plan.schedule", "plan.slices",
    },
    "plan.predict": {"config", "model_flops", "params", "plan.schedule", "plan.slices"},
    "plan.report": {"config", "console", "plan.slices"},
    "plan.book": {"config", "console", "plan.measure", "plan.report", "plan.slices", "records"},
    "plan.remat": {"config", "console", "plan.book", "plan.slices"},
    "plan.search": {"config", "plan.book", "plan.remat", "plan.slices"},
    "plan.calibrate": {"atomic", "bucket", "config", "metrics", "model_flops", "plan.slices"},
}
# fmt: on


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, set[str]]:
    return {
        ".".join(f.relative_to(PACKAGE).with_suffix("").parts): imports(f)
        for f in PACKAGE.rglob("*.py")
        if f.name != "__init__.py"
    }


def test_imports_go_one_way():
    found = modules()
    for name, allowed in MAY_IMPORT.items():
        inside = {i.removeprefix("easylm_mling.") for i in found[name] if i.startswith("easylm_mling.")}
        inside = {i for i in inside if i in found}
        assert inside <= allowed, f"{name} imports {inside - allowed}"


def test_only_the_host_loader_of_the_mixer_knows_jax():
    for name, found in modules().items():
        if name.startswith("config.") or (name.startswith("data.") and name != "data.loader"):
            assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in found), name


def test_hugging_face_names_stay_in_the_table_and_in_hf():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "params.py" and file.parent.name != "hf":
            assert "model.layers" not in file.read_text(encoding="utf-8"), file


def test_only_the_checkpoint_module_knows_orbax():
    for name, found in modules().items():
        assert name == "checkpoint" or not any(i.startswith("orbax") for i in found), name


# The same for what runs on a laptop, which knows nothing of the package.
LAUNCHER_MAY_IMPORT = {
    "run_file": set(),
    "gcloud": set(),
    "bucket": {"gcloud", "run_file"},
    "pack": {"run_file"},
    "machine": {"bucket", "gcloud", "run_file"},
    "workers": {"gcloud", "run_file"},
    "decide": {"machine", "workers"},
    "records": {"bucket"},
    "logs": {"bucket"},
    "rehearse": {"bucket", "gcloud", "run_file"},
    "status": {"bucket", "logs", "machine", "records", "run_file"},
    "drive": {"bucket", "decide", "machine", "pack", "records", "run_file", "workers"},
}


def test_the_launcher_is_a_house_of_its_own():
    folder = PACKAGE.parent / "tpu_scripts" / "launcher"
    assert {f.stem for f in folder.glob("*.py")} == {"__init__", *LAUNCHER_MAY_IMPORT}
    for name, allowed in LAUNCHER_MAY_IMPORT.items():
        inside = set()
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                inside |= {node.module} if node.module else {alias.name for alias in node.names}
        assert inside <= allowed, f"{name} imports {inside - allowed}"
