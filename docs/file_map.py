"""Write the file map of docs/architecture.md from the docstrings of the modules: `python docs/file_map.py`."""

import ast
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "easylm_mling"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- file map: written by docs/file_map.py -->", "<!-- end of the file map -->"
ROOMS = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["ROOMS"]


def with_file_map(page: str) -> str:
    """Return the text of the page with its file map made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{file_map()}\n\n{END}{rest.partition(END)[2]}"


def file_map() -> str:
    """Return one table row for each room and module, in the order in which rooms may import each other."""
    rows = ["| file | what it holds |", "|---|---|"]
    for room in ROOMS:
        folder = PACKAGE / room
        if folder.is_dir():
            rows.append(f"| **`{room}/`** | **{summary(folder / '__init__.py')}** |")
            files = sorted(folder.glob("*.py"))
        else:
            files = [folder.with_suffix(".py")]
        rows += [f"| `{f.relative_to(PACKAGE).as_posix()}` | {summary(f)} |" for f in files if f.name != "__init__.py"]
    return "\n".join(rows)


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_file_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
