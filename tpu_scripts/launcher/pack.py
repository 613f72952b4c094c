"""What every worker gets: the project's code and configs, and the run's command and environment, in one file named after
its content. A run keeps to it: a machine that comes back after a week gets the same bits, whatever was edited since.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

from .run_file import ROOT, RunFile

_CODE = ("easylm_mling", "configs", "pyproject.toml", "requirements.lock")
_SCRIPTS = ("worker_setup.sh", "worker_run.sh", "requirements-tpu.lock")


def make_pack(run: RunFile) -> tuple[str, bytes]:
    """Its name (the first 16 digits of its SHA-256) and content, the same for the same files. No secret is in it."""
    content = {}
    for name in (*_CODE, *(f"tpu_scripts/{s}" for s in _SCRIPTS), *run.files):
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                content[str(file.relative_to(ROOT))] = file.read_bytes()
    content["launch/command"] = _nul_separated(run.command)
    content["launch/environment"] = _nul_separated([f"{k}={v}" for k, v in run.environment.items()])
    content["launch/run_dir"], content["launch/url"] = run.run_dir.encode(), run.url.encode()
    for name, script in (("setup", run.setup), ("after", run.after)):
        if script:
            content[f"launch/{name}.sh"] = script.read_bytes()
    data = _archive(content)
    return hashlib.sha256(data).hexdigest()[:16], data


def _nul_separated(values) -> bytes:
    return b"".join(v.encode() + b"\0" for v in values)


def _archive(content: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # No time and no owner: the same files make the same bytes.
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name in sorted(content):
            entry = tarfile.TarInfo(Path(name).as_posix())
            entry.size, entry.mode = len(content[name]), 0o644
            archive.addfile(entry, io.BytesIO(content[name]))
    return packed.getvalue()
