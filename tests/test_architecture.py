"""The import direction of the house, held by reading every import."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "easylm_mling"

# From the ground up. A folder imports only what stands before it; a file at the top is a room of its own.
ROOMS = (
    "errors", "formatting", "hardware", "charts", "config", "storage", "data/sources", "data/tokenization", "data/conversations", "data/conversion", "data",
    "data/tools", "model", "distributed", "evaluation/scoring", "training", "checkpoint", "monitoring", "monitoring/report", "plan", "run", "hf", "merge", "inference", "serving", "evaluation", "judging", "api", "cli", "__main__",
)  # fmt: skip


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
        "/".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix("/__init__"): imports(f)
        for f in PACKAGE.rglob("*.py")
        if f != PACKAGE / "__init__.py"
    }


def room(module: str) -> int:
    """Its number in ROOMS, by the longest folder that holds it."""
    return ROOMS.index(next(path for path in paths(module) if path in ROOMS))


def paths(module: str) -> list[str]:
    """`a/b/c`, `a/b`, `a`."""
    parts = module.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def test_imports_go_one_way():
    there = modules()
    for name, inside in there.items():
        targets = {i.removeprefix("easylm_mling.").replace(".", "/") for i in inside if i.startswith("easylm_mling.")}
        back = [target for target in targets if target in there and room(target) > room(name)]
        assert not back, f"{name} imports {back}, which stand above it"


def test_only_the_host_loader_of_the_mixer_knows_jax():
    for name, found in modules().items():
        if name.startswith("config/") or (name.startswith("data/") and name != "data/loader"):
            assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in found), name


def test_hugging_face_names_stay_in_the_table_and_in_hf():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "params.py" and file.parent.name != "hf":
            assert "model.layers" not in file.read_text(encoding="utf-8"), file


def test_only_the_checkpoint_modules_know_orbax():
    for name, found in modules().items():
        knows = name in ("checkpoint/checkpoint", "checkpoint/parameters")
        assert knows or not any(i.startswith("orbax") for i in found), name


# The same for what runs on a laptop, which knows nothing of the package.
LAUNCHER_MAY_IMPORT = {
    "run_file": set(),
    "gcloud": set(),
    "state": {"run_file"},
    "bucket": {"gcloud", "state"},
    "driving": {"bucket", "run_file", "state"},
    "pack": {"run_file"},
    "machine": {"gcloud", "run_file"},
    "requests": {"gcloud", "machine", "run_file", "state"},
    "asking": {"driving", "gcloud", "machine", "requests", "run_file", "state"},
    "workers": {"gcloud", "run_file"},
    "decide": {"machine", "workers"},
    "records": {"bucket"},
    "logs": {"bucket"},
    "rehearse": {"gcloud", "machine", "run_file", "state"},
    "status": {"bucket", "driving", "logs", "machine", "records", "requests", "run_file", "state"},
    "drive": {"asking", "bucket", "decide", "driving", "machine", "pack", "records", "run_file", "state", "workers"},
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


def arrows() -> dict[tuple[str, str], int]:
    """How many imports run from one room to another."""
    there, count = modules(), {}
    for name, inside in there.items():
        for target in {i.removeprefix("easylm_mling.").replace(".", "/") for i in inside} & there.keys():
            if room(name) != room(target):
                pair = ROOMS[room(name)], ROOMS[room(target)]
                count[pair] = count.get(pair, 0) + 1
    return count


if __name__ == "__main__":  # python tests/test_architecture.py: the picture of imports by room
    for (above, below), number in sorted(arrows().items(), key=lambda item: [ROOMS.index(r) for r in item[0]]):
        print(f"{above:20} -> {below:20} {number}")
    print(f"{len(arrows())} arrows, none back")
