"""What the pages say is so: the file map, links, commands, paths and keys of the config."""

import dataclasses
import re
import runpy
import shlex
import types
import typing
from pathlib import Path

import pytest
import yaml

from easylm_mling.cli.main import build_parser
from easylm_mling.config import RunConfig, SourceConfig, load

ROOT = Path(__file__).parent.parent
MAP = runpy.run_path(str(ROOT / "docs" / "file_map.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / f"{p}/README.md" for p in ("data", "tests/faults", "tpu_scripts"))]
SECTIONS = [f.name for f in dataclasses.fields(RunConfig)]
FILE_SUFFIXES = ("ini", "json", "jsonl", "md", "py", "sh", "toml", "yaml")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def by_page(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=name_of)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The command lines of `easylm-mling`, in blocks of code and inside sentences."""
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8")).partition(MAP["BEGIN"])[0]
    lines = re.findall(r"^    (?:\$ )?(easylm-mling .+)$", text, re.M)
    inline = re.findall(r"`(easylm-mling [^`]+)`", text)
    return [re.sub(r"\s[#>]\s.*", "", line, flags=re.S) for line in lines + inline]


def is_key(path: list[str]) -> bool:
    """Whether `path` leads from RunConfig to a section or a field."""
    kind: object = RunConfig
    for name in path:
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if typing.get_origin(kind) in (dict, tuple):
            kind = typing.get_args(kind)[typing.get_origin(kind) is dict]
        elif kind is SourceConfig and name == "sources":  # a group of sources
            kind = dict[str, SourceConfig]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            return False
    return kind is not None


def leaves(tree: object, path: tuple[str, ...] = ()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path
    for name, value in items or ():
        yield from leaves(value, (*path, str(name)))


def test_the_file_map_is_true():
    page = MAP["PAGE"].read_text(encoding="utf-8")
    assert page == MAP["with_file_map"](page), "run `python docs/file_map.py`"


def test_every_module_says_what_it_holds():
    for file in (ROOT / "easylm_mling").rglob("*.py"):
        assert MAP["summary"](file), f"{file} has no docstring"


@by_page(LINKING)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if target.startswith(("http://", "https://")):
            continue
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@by_page(PAGES)
def test_commands_are_understood(page):
    for command in commands(page):
        verb, *rest = shlex.split(command)[1:]
        try:
            parsed = build_parser().parse_args([verb, *rest])
        except SystemExit as end:
            assert end.code == 0, command
            continue
        files = [x for x in getattr(parsed, "config", ()) if "=" not in x]
        written_by_a_search = any(x.endswith("best.yaml") for x in files)
        if verb in ("train", "plan") and not written_by_a_search:
            for other in getattr(parsed, "compare", ()) or [None]:
                load([*files, *filter(None, [other])], [x for x in parsed.config if "=" in x])


@by_page(LINKING)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = text.partition("### Where modules went")[0]
    named = re.findall(rf"`((?:[a-z_.\-]\w*/)+[\w.\-]+\.(?:{'|'.join(FILE_SUFFIXES)}))`", text)
    named += re.findall(r"(?<![\w/])(?:configs|tests|benchmarks|tpu_scripts)/[\w./\-]+\.(?:yaml|py|md|ini|sh)", text)
    for name in named:
        places = [ROOT, ROOT / "easylm_mling", page.parent]
        assert any((place / name).exists() for place in places), name


@by_page([p for p in PAGES if p.name != "config.md"])
def test_keys_are_those_of_the_config(page):
    text = page.read_text(encoding="utf-8")
    for key in re.findall(rf"(?<![\w/.])(?:{'|'.join(SECTIONS)})(?:\.[A-Za-z_]\w*)+", text):
        path = key.split(".")
        assert path[-1] in FILE_SUFFIXES or is_key(path), key
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S):
        for path in leaves(yaml.safe_load(block)):
            assert is_key(list(path)), ".".join(path)


def test_the_readme_shows_my_corpus_as_it_is():
    block = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    assert (ROOT / "configs" / "my-corpus.yaml").read_text(encoding="utf-8").endswith(block)


def test_the_readme_has_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 110


def test_formats_are_those_of_the_code():
    rows = re.findall(r"^\| [\w ]+ \| (\d+) \| .+ \| `(.+\.py)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(rows) == 9
    for number, module in rows:
        assert f"FORMAT = {number}\n" in (ROOT / "easylm_mling" / module).read_text(encoding="utf-8").replace(
            '"', ""
        ), module
