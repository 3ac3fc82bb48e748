"""Models of the hub of Hugging Face: from the local cache, or fetched into it."""

from __future__ import annotations

import re
from pathlib import Path

from vpworkbench.errors import CheckpointError, first_line

HUB = "https://huggingface.co/"


def is_on_hub(name: str) -> bool:
    """True for OWNER/NAME, if no such folder exists: a mistyped folder or run must not ask the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def hub_folder(name: str, setting: str) -> Path:
    """The folder of a model of the hub in the local cache, fetched if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "model*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not (folder / "config.json").exists():
            raise OSError("it has no config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{setting} {name!r}: not in the local cache, and not available from the hub ({first_line(error)}); fetch "
            f"its json, txt and safetensors files from {HUB}{name} into a folder, and give the folder as {setting}"
        ) from None
    return folder
