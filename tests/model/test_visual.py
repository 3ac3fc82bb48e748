"""The visual side against timm's own networks."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch.utils.flop_counter import FlopCounterMode

from vpworkbench.errors import SettingsError
from vpworkbench.model.swin import scatter_windows
from vpworkbench.model.visual import build_visual
from vpworkbench.settings import PRESETS, VisualSettings

SWIN_T = {"patch_px": 4, "width": 48, "depths": (2, 2, 2, 2), "heads": (3, 6, 12, 24)}
CASES = [(224, 7), (384, 12), (384, 7), (288, 7)]


def parser(image_px: int, window: int):
    torch.manual_seed(0)
    return build_visual(VisualSettings(image_px=image_px, window=window, **SWIN_T)).eval()


def images(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def timm_twin(visual) -> tuple[SwinTransformer, list[torch.Tensor]]:
    """timm's own network with the same weights, all blocks unfused; the softmax outputs it makes."""
    settings = visual.settings
    twin = SwinTransformer(
        img_size=settings.image_px,
        patch_size=4,
        embed_dim=settings.width,
        depths=settings.depths,
        num_heads=settings.heads,
        window_size=settings.window,
        num_classes=0,
    ).eval()
    twin.load_state_dict(visual.network.state_dict())
    made: list[torch.Tensor] = []
    last = twin.layers[-1].blocks[-1].attn
    last.fused_attn = False
    last.softmax.register_forward_hook(lambda module, args, output: made.append(output))
    return twin, made


@pytest.mark.parametrize("image_px, window", CASES)
def test_tokens_equal_timm(image_px, window):
    visual = parser(image_px, window)
    twin, _ = timm_twin(visual)
    batch = images(1, image_px)
    with torch.no_grad():
        expected = twin.forward_features(visual.normalise(batch)).flatten(1, 2)
        assert (visual(batch).features - expected).abs().max() < 1e-5


@pytest.mark.parametrize("image_px, window", CASES)
def test_parsing_rows_sum_to_one(image_px, window):
    visual = parser(image_px, window)
    with torch.no_grad():
        parsing = visual(images(2, image_px)).parsing
    m = visual.settings.tokens
    assert parsing.shape == (2, visual.settings.heads[-1], m, m)
    torch.testing.assert_close(parsing.sum(-1), torch.ones_like(parsing.sum(-1)))


@pytest.mark.parametrize("image_px, window", [(224, 7), (384, 12)])
def test_one_window_is_timms_softmax(image_px, window):
    visual = parser(image_px, window)
    twin, made = timm_twin(visual)
    batch = images(1, image_px)
    with torch.no_grad():
        twin.forward_features(visual.normalise(batch))
        torch.testing.assert_close(visual(batch).parsing, made[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_px", [384, 288])
def test_several_windows_are_placed_token_by_token(image_px):
    """Against timm's windows, placed by a plain loop over the shifted and padded grid."""
    visual = parser(image_px, 7)
    twin, made = timm_twin(visual)
    batch = images(1, image_px)
    with torch.no_grad():
        twin.forward_features(visual.normalise(batch))
        parsing = visual(batch).parsing[0]
    grid, padded, shift = visual.settings.grid, -(-visual.settings.grid // 7) * 7, 3
    token = {}  # (window, place) -> token
    for row in range(padded):
        for column in range(padded):
            if row < grid and column < grid:
                here = (row // 7) * (padded // 7) + column // 7, (row % 7) * 7 + column % 7
                token[here] = ((row + shift) % grid) * grid + (column + shift) % grid
    expected = torch.zeros_like(parsing)
    for (window, query), i in token.items():
        for (other, key), j in token.items():
            if window == other:
                expected[:, i, j] = made[0][window, :, query, key]
    outside = expected == 0
    assert outside.any() and (parsing[outside] == 0).all()
    torch.testing.assert_close(parsing, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-6)


def test_scatter_drops_padding():
    places = torch.tensor([[0, 1], [2, 3]])  # three tokens; place 3 is padding
    weights = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.2, 0.8], [0.5, 0.5]]])[:, None]
    expected = torch.tensor([[0.5, 0.5, 0], [0.25, 0.75, 0], [0, 0, 1]])
    torch.testing.assert_close(scatter_windows(weights, places, 3)[0, 0], expected)


@pytest.mark.parametrize(
    "name, parameters, multiply_adds, bare_parameters",
    [
        ("resnet50", 25.6e6, 4.1e9, 23.5e6),
        ("resnet101", 44.5e6, 7.8e9, 42.5e6),
        ("swin_tiny_patch4_window7_224", 28.0e6, 4.5e9, 27.5e6),
    ],
)
def test_table_5_parameters_and_flops(name, parameters, multiply_adds, bare_parameters):
    network = timm.create_model(name, pretrained=False).eval()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.02)
    network.reset_classifier(0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(bare_parameters, rel=0.02)


def test_backbones_of_the_ablation_are_cut_from_those():
    """Our Swin-T and ResNet-50 hold the parameters of timm's without the head."""
    ablation = PRESETS["ablation-224"].visual
    for family, name in (("swin", "swin_tiny_patch4_window7_224"), ("grid", "resnet50")):
        ours = build_visual(ablation.with_overrides({"family": family}))
        theirs = timm.create_model(name, pretrained=False, num_classes=0)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("family", ["swin", "grid", "patch"])
def test_families_give_the_same_number_of_tokens(family):
    visual = build_visual(VisualSettings(family=family)).eval()
    with torch.no_grad():
        tokens = visual(images(2, 96))
    assert tokens.features.shape == (2, visual.settings.tokens, visual.width) and visual.settings.tokens == 36
    assert (tokens.parsing is not None) == (family == "swin")


def test_wrong_image_size_names_both():
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\).*96"):
        build_visual(VisualSettings())(images(2, 64))


@pytest.mark.parametrize(
    "backbone, stride, message",
    [
        ("resnet5000", 16, r"Unknown model.*did you mean 'resnet50\w*'"),
        ("resnet10t", 12, "no such stride"),
        ("vgg11", 16, "no such stride"),
        ("efficientnet_b0", 12, r"map of \[3, 3\]"),
        ("densenet121", 16, "'output_stride'"),
        ("vit_tiny_patch16_224", 16, "'output_stride'"),
        ("vit_tiny_patch16_224", 32, "Input height"),
    ],
)
def test_what_is_no_grid_of_a_cnn_is_refused(backbone, stride, message):
    settings = VisualSettings(family="grid", backbone=backbone, stride=stride, image_px=96)
    wanted = f"visual.backbone '{backbone}', visual.stride {stride}: .*{message}.*a CNN with `output_stride`"
    with pytest.raises(SettingsError, match=wanted):
        build_visual(settings)


@pytest.mark.parametrize("backbone, stride", [("densenet121", 32), ("mobilenetv3_small_050", 32), ("regnetx_002", 8)])
def test_other_cnns_are_a_grid(backbone, stride):
    visual = build_visual(VisualSettings(family="grid", backbone=backbone, stride=stride, image_px=64)).eval()
    with torch.no_grad():
        assert visual(images(1, 64)).features.shape == (1, (64 // stride) ** 2, visual.width)
