"""Generated scenes on disk: made once for each setting, then read like any other set."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings.scenes import PairSettings, SceneSettings


def cache_root() -> Path:
    """The folder for everything that can be made again: `$VPW_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("VPW_CACHE") or Path.home() / ".cache" / "vpworkbench")


def scenes_folder(settings: SceneSettings | PairSettings) -> Path:
    """The folder of generated scenes, or of minimal pairs, named by a hash of their settings."""
    kind = "minimal-pairs" if isinstance(settings, PairSettings) else "scenes"
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:10]
    return cache_root() / f"{kind}-{settings.image_px}px-{settings.difficulty}-{digest}"


def cached_scenes(settings: SceneSettings) -> Path:
    """The folder of generated scenes; they are made first if they are not there yet."""
    return write_scenes(scenes_folder(settings), settings)
