"""Models of the hub of Hugging Face: from the local cache, or fetched into it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vpworkbench.errors import CheckpointError, first_line

HUB = "https://huggingface.co/"


def is_on_hub(name: str) -> bool:
    """True for OWNER/NAME, if no such folder exists: a mistyped folder or run must not ask the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def model_config(file: Path) -> dict[str, Any]:
    """The content of a model's `config.json`; a `CheckpointError` if it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise CheckpointError(f"{file}: not a model's configuration ({error}); was it cut off?") from None
    return content


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
