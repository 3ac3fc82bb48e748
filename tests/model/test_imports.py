"""The model alone: without POSIX, pandas, runs or data, and without the libraries that only some families need."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ("fcntl", "pandas", "vpworkbench.runs", "vpworkbench.data", "vpworkbench.system")
PROGRAM = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {BLOCKED} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import vpworkbench.losses
from vpworkbench.model import VisualParsingModel
print("late", sorted({{"timm", "torchvision", "transformers"}} & set(sys.modules)))

import torch
from vpworkbench.model import build_tokenizer
from vpworkbench.model.budget import budget
from vpworkbench.model.weights import start_visual
from vpworkbench.settings import FusionSettings, ModelSettings, VisualSettings
for family in ("swin", "grid", "patch", "regions"):
    settings = ModelSettings(
        visual=VisualSettings(family=family, regions=5, region_width=8),
        fusion=FusionSettings(layers=1, width=32, heads=2, feed_forward=64),
        text_tokens=12,
    )
    model = VisualParsingModel(settings, build_tokenizer(["a red ball"])).eval()
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8) if settings.visual.kind.pixels else torch.ones(1, 5, 13)
    joint = model(**model.prepare(images, ["a ball"]).forward)
    print(family, tuple(joint.vision.shape), budget(model).visual_tokens)
"""


def test_the_model_needs_neither_posix_nor_pandas_nor_files():
    """Every family builds and runs where these modules do not exist; timm and transformers load when one is built."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.splitlines() == [
        "late []",
        "swin (1, 36, 32) 36",
        "grid (1, 36, 32) 36",
        "patch (1, 36, 32) 36",
        "regions (1, 5, 32) 5",
    ]
