"""What the tests share: a scratch root for runs, a few generated scenes, real data where it is."""

from __future__ import annotations

import os
from pathlib import Path

# Two processes of tests share the cores: theirs and their kernels' threads would wait for each other, spinning. Read
# when numpy and torch are loaded, so it stands before them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no run's is asked of the hub, for half a minute where none answers

import pytest
import torch
from pydantic import Field
from torch import nn

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.records import Picture
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.runs import Run, open_run
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings import DataSettings, FusionSettings, ModelSettings, Settings, VisualSettings
from vpworkbench.settings.scenes import SceneSettings

SCENES = SceneSettings(images=60, val=20, test=10)
FEW = {"data.scenes.images": 60, "data.scenes.val": 20, "data.scenes.test": 10, "data.workers": 0, "train.images": 4}
"""Overrides for a pre-training of seconds."""
NARROW = {"visual.width": 32, "visual.heads": (2, 4), "data.workers": 0, "train.bf16": False}
"""Overrides that fit `narrow_model`; in float32 on every machine."""


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory):
    """Runs and generated scenes go to a scratch folder: no finished run makes a test pass."""
    root = tmp_path_factory.mktemp("workbench")
    base = tmp_path_factory.getbasetemp()  # with two processes of tests, in a folder of both: they share the scenes
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["VPW_RUNS"], os.environ["VPW_CACHE"] = str(root / "runs"), str(shared / "cache")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    return root


class SmallMask(Settings):
    budget: int = Field(7, ge=1)


class SmallSettings(Settings):
    """Settings of a run that trains nothing."""

    seed: int = 0
    rate: float = 0.1
    words: tuple[str, ...] = ("a", "b")
    mask: SmallMask = SmallMask()


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of this test alone go there; kernels find the package where it is not installed."""
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return tmp_path / "runs"


@pytest.fixture
def run(runs_folder: Path) -> Run:
    return open_run("01_pretrain", SmallSettings(), name="a")


@pytest.fixture(scope="session")
def scenes_folder(scratch: Path) -> Path:
    return write_scenes(scratch / "scenes", SCENES)


@pytest.fixture(scope="session")
def scenes(scenes_folder: Path) -> list[Picture]:
    return read_pictures(scenes_folder)


@pytest.fixture
def model(scenes: list[Picture]) -> VisualParsingModel:
    """A narrow model with random weights, in evaluation mode."""
    return narrow_model(scenes)


def narrow_model(scenes: list[Picture], **visual: object) -> VisualParsingModel:
    torch.manual_seed(0)
    settings = ModelSettings(
        visual=VisualSettings(width=32, heads=(2, 4), **visual),
        fusion=FusionSettings(layers=2, width=32, heads=2, feed_forward=64),
        text_tokens=DataSettings().text_tokens,
    )
    tokenizer = build_tokenizer([text for picture in scenes for text in picture.captions])
    return VisualParsingModel(settings, tokenizer).eval()


def without_dropout(model: nn.Module, share: float = 0.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Flickr 1k and NLVR v1: `$VPW_DATA`, else beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VPW_DATA", default))
    if not (folder / "flickr1k").is_dir():
        pytest.skip(f"real data not at {folder} (set VPW_DATA)")
    return folder
