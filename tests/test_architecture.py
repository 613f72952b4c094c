"""The import direction of the house, held by reading every import."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "easylm_mling"

# What each module may import of this package, at most. Entries (train, generate, __main__ ...) may import anything below them.
MAY_IMPORT = {
    "config": set(),
    "atomic": {"config"},
    "params": {"config"},
    "sharding": {"config", "params"},
    "attention": set(),
    "model": {"attention", "config", "sharding"},
    "loss": {"model", "sharding"},
    "optimizer": {"config", "params"},
    "step": {"config", "loss", "model", "optimizer", "sharding"},
    "checkpoint": {"config", "step"},
    "run_dir": {"atomic", "config", "hf.files"},
    "metrics": set(),
    "summary": {"checkpoint", "config", "data.mixture", "metrics"},
    "data.catalog": {"atomic", "config", "data.layouts", "data.readers"},
    "data.layouts": {"config", "data.readers"},
    "data.readers": {"config"},
    "data.tokenizer": {"config"},
    "data.blocks": {"data.catalog", "data.readers"},
    "data.mixture": {"config", "data.blocks"},
    "data.streams": {"config", "data.blocks", "data.mixture", "data.tokenizer"},
}


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
        if name == "config" or (name.startswith("data.") and name != "data.loader"):
            assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in found), name


def test_hugging_face_names_stay_in_the_table_and_in_hf():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "params.py" and file.parent.name != "hf":
            assert "model.layers" not in file.read_text(encoding="utf-8"), file


def test_only_the_checkpoint_module_knows_orbax():
    for name, found in modules().items():
        assert name == "checkpoint" or not any(i.startswith("orbax") for i in found), name
