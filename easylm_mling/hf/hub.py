"""Download and upload models by their hub names. huggingface_hub finds a token itself; none is seen here."""

import importlib.util
import re
from pathlib import Path

from easylm_mling.data.tokenization.files import TOKENIZER_FILES
from easylm_mling.errors import ConfigError, one_line


def local_directory(name: str | Path, revision: str | None = None) -> Path:
    """Return `name` itself if it is a directory, else that of the hub model of this name (`google/gemma-7b`), downloaded.

    Only weights in safetensors, configs and tokenizers are downloaded. Raises ConfigError if the download fails.
    """
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        if revision is not None:
            raise ConfigError(f"{name}: a revision belongs to a hub name such as google/gemma-7b; leave it out")
        return Path(name)
    hub = _hub(f"{name} is no directory here; to download it from the hub")
    try:
        patterns = ["*.json", "*.safetensors", *TOKENIZER_FILES]
        return Path(hub.snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, hub.errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ConfigError(
            f"{name}: no directory here, and the download from the hub failed ({one_line(error)}); check the name, accept the "
            "model's licence on its page and log in with `hf auth login`, or download it and name the directory"
        ) from None


def push(directory: str | Path, repository: str) -> str:
    """Upload a directory as the hub model `repository`, private if it is new. Returns its address; raises ConfigError."""
    hub = _hub("to upload a model")
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(directory), commit_message="Upload by easylm-mling")
    except (OSError, ValueError, hub.errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ConfigError(
            f"{repository}: the upload failed ({one_line(error)}), and {directory} is complete; log in with `hf auth login` "
            f"and run `hf upload {repository} {directory}`"
        ) from None
    return f"https://huggingface.co/{repository}"


def _hub(purpose: str):
    """Import huggingface_hub, an extra; `purpose` begins the error where it is missing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"{purpose}, install huggingface_hub: pip install 'easylm-mling[hf]'")
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub
