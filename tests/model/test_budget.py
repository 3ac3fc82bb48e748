"""What a model costs, against counts by hand and the paper's Table 5."""

from __future__ import annotations

import pytest
from conftest import narrow_model

from vpworkbench import subjects
from vpworkbench.model.budget import budget, short
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.settings import ModelSettings, preset
from vpworkbench.studies.compare import budgets


def test_products_of_the_fusion_and_of_patches_by_hand(scenes):
    model = narrow_model(scenes, family="patch")
    found = budget(model)
    m, n, d, wide, c = 36, model.settings.text_tokens, 32, 64, 192
    assert found.visual_multiply_adds == m * 16 * 16 * 3 * c
    assert found.visual_parameters == 16 * 16 * 3 * c + c
    tokens = m + n
    layer = tokens * (4 * d * d + 2 * d * wide) + 2 * tokens * tokens * d
    assert found.multiply_adds == found.visual_multiply_adds + m * c * d + 2 * layer
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.visual_tokens, found.words) == (36, n) and "36 visual tokens" in str(found)


def test_every_part_keeps_its_mode(scenes):
    model = narrow_model(scenes).train()
    model.visual.eval()
    budget(model)
    assert model.training and model.fusion.training and not model.visual.training


def test_numbers_are_short():
    assert [short(number) for number in (0, 36, 3.3125, 0.35379, 147_648, 1_209_186, 4.5e9)] == [
        "0",
        "36",
        "3.31",
        "0.354",
        "148 k",
        "1.21 M",
        "4.5 G",
    ]


def test_regions_cost_nothing_but_their_embedding(scenes):
    found = budget(narrow_model(scenes, family="regions", regions=9, region_width=12))
    assert (found.visual_parameters, found.visual_multiply_adds, found.visual_tokens) == (0, 0, 9)


@pytest.mark.parametrize("family, parameters, multiply_adds", [("swin", 27.5e6, 4.5e9), ("grid", 23.5e6, 4.1e9)])
def test_the_backbones_of_table_5(scenes, family, parameters, multiply_adds):
    ablation = preset("ablation-224")
    settings = ModelSettings(
        visual=ablation.visual.with_overrides({"family": family}), fusion=ablation.fusion, text_tokens=40
    )
    found = budget(VisualParsingModel(settings, narrow_model(scenes).tokenizer))
    assert found.visual_parameters == pytest.approx(parameters, rel=0.02)
    assert found.visual_multiply_adds == pytest.approx(multiply_adds, rel=0.03)
    assert found.visual_tokens == 49


def test_every_model_under_comparison_has_a_row(scenes):
    table = budgets(subjects.load_all([""]), [picture for picture in scenes if picture.captions])
    assert table.loc["shipped", "visual_tokens"] == 36 and table.loc["shipped", "multiply_adds"] > 1e6
