"""Settings of generated scenes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpworkbench.settings.base import Settings

Difficulty = Literal["easy", "medium", "hard"]


class SceneSettings(Settings):
    """How many scenes, and of which kind; equal settings give equal files."""

    images: int = Field(4000, ge=1, description="training images")
    val: int = Field(400, ge=0, description="validation images")
    test: int = Field(400, ge=0, description="test images")
    image_px: int = Field(96, ge=32, le=1024, description="side of the square images")
    difficulty: Difficulty = Field("easy", description="2-4, 3-6 or 4-8 things per image")
    seed: int = Field(0, ge=0)
    generator: Literal[1] = Field(1, description="version of the generator")


class PairSettings(Settings):
    """How many minimal pairs of scenes, and of which kind; equal settings give equal files."""

    pairs: int = Field(240, ge=1, description="pairs; each property is as frequent as the others")
    image_px: int = Field(96, ge=32, le=1024, description="side of the square images")
    difficulty: Difficulty = Field("easy", description="2-4, 3-6 or 4-8 things per image")
    seed: int = Field(0, ge=0)
    generator: Literal[1] = Field(1, description="version of the generator")
