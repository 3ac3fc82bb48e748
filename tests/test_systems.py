"""Systems of the paper's tables as values: each with its own objectives, from regions with classes to the explorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCENES, narrow_model
from torch.nn import functional

from vpworkbench.data.inputs import visual_input as input_of
from vpworkbench.data.regions import RegionFiles, read_npz, write_regions
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.explorer.readings import read
from vpworkbench.model.fusion import build_fusion, seq2seq_mask
from vpworkbench.model.readouts import write_captions
from vpworkbench.model.visual import VisualTokens
from vpworkbench.probing import probe
from vpworkbench.runs import open_run
from vpworkbench.settings import FusionSettings, RegionSettings, TrainSettings, pretrain_settings
from vpworkbench.settings.presets import SYSTEMS
from vpworkbench.subjects import load
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare, pretrain
from vpworkbench.train.region_features import KINDS, RegionNetwork, make_regions

LOSSES = {
    "vilbert": {"mlm", "itm", "mrc"},
    "vl-bert": {"mlm", "mrc"},
    "unicoder-vl": {"mlm", "itm", "mrc"},
    "unified-vlp": {"mlm"},
}
REGIONS = RegionSettings(scenes=SCENES, train=TrainSettings(epochs=1, images=20), width=16, workers=0)


@pytest.fixture(scope="session")
def named_regions(scratch: Path) -> Path:
    make_regions(scratch / "named", REGIONS)
    return scratch / "named"


def settings_of(system: str, regions: Path, **overrides: object):
    few = {f"data.scenes.{name}": count for name, count in (("images", 60), ("val", 20), ("test", 10))}
    few |= {"data.workers": 0, "train.images": 4, "train.log_every": 2, "fusion.layers": 2, "fusion.width": 32,
            "fusion.heads": 2, "fusion.feed_forward": 64}  # fmt: skip
    options = {"visual": "regions", "regions": str(regions), "visual_tokens": 5, "steps": 2}
    return pretrain_settings(system=system, **options, overrides=few | overrides)


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_trains_by_its_own_objectives_and_is_probed_and_explored(system, named_regions, scenes):
    settings = settings_of(system, named_regions)
    run = open_run("01_pretrain", settings)
    assert pretrain(run, prepare(settings), settings) == 2
    metrics = run.metrics()
    assert {"mlm", "itm", "vla", "mfr", "mvm", "mrc"} & set(metrics) == LOSSES[system]
    assert np.isfinite(metrics.to_numpy(dtype=float)).all()
    subject = load(str(run.folder))
    probed = probe(subject, scenes, images=3)
    assert np.isfinite(probed.from_input).all() and np.isfinite(probed.nmi).all()
    assert read(subject, scenes[0], scenes[0].captions[0]).layers == probed.flow.shape[1]


def test_classes_are_what_the_region_network_says(named_regions, scenes):
    found = read_npz(next(named_regions.rglob("val-*.npz")))
    network = RegionNetwork(REGIONS)
    features = torch.from_numpy(found.features)
    logits = [head(features).argmax(1).numpy() for head in network.heads.values()]
    sizes = tuple(map(len, KINDS.values()))
    assert np.array_equal(network.named(features).numpy(), np.ravel_multi_index(logits, sizes))
    chosen = settings_of("unicoder-vl", named_regions)
    assert chosen.visual.classes == np.prod(sizes) > found.classes.max()
    assert settings_of("", named_regions).visual.classes == 0


def test_regions_without_classes_or_with_others_are_refused(tmp_path, scenes):
    image, boxes = scenes[0].image, np.array([[0, 0, 9, 9], [4, 4, 20, 20]])
    file = (tmp_path / image.name).with_suffix(".npz")
    for classes, says in ((None, "no classes, and visual.classes is 3"), ([0, 3], "class 3, and visual.classes is 3"),
                          ([0, -1], "not one number from 0 for each of 2")):  # fmt: skip
        named = {} if classes is None else {"classes": np.array(classes)}
        write_regions(file, np.ones((2, 4)), boxes, (96, 96), **named)
        with pytest.raises(DataError, match=says):
            RegionFiles(tmp_path, most=2, width=4, classes=3).stack([image])
    write_regions(file, np.ones((2, 4)), boxes, (96, 96), classes=np.array([2, 0]))
    assert RegionFiles(tmp_path, most=3, width=4, classes=3).stack([image])[0, :, -1].tolist() == [3, 1, 0]
    assert RegionFiles(tmp_path, most=3, width=4).stack([image])[0, :, -1].tolist() == [1, 1, 0]
    for system, overrides, says in (
        ("unicoder-vl", {}, "loss.mrc classifies"),
        ("unified-vlp", {"loss.itm": 1.0}, "seq2seq"),
    ):
        with pytest.raises(SettingsError, match=says):
            pretrain_settings(system=system, overrides=overrides)
    with pytest.raises(SettingsError, match="no system 'vlbert'; did you mean 'vl-bert'"):
        pretrain_settings(system="vlbert")


def test_mrc_is_the_cross_entropy_of_hidden_regions(named_regions):
    settings = settings_of("unicoder-vl", named_regions, **{"mask.budget": 3})
    prepared = prepare(settings)
    model, objective = prepared.model.eval(), Pretraining(settings)
    batch = group_batches(prepared.splits["train"], model, settings.data, images=4, seed=0)[0]
    sums = objective.losses(model, batch)
    visual, wanted = model.encode(batch.images), 0.0
    masked = objective.masked(visual, batch)
    joint = model.fuse(visual, batch.words, batch.word_tokens, image_index=batch.image_index, masked=masked)
    for row in batch.matched.nonzero()[:, 0]:
        image, places = batch.image_index[row], masked[row].nonzero()[:, 0]
        classes = batch.images[image, places, -1].long() - 1
        logits = joint.vision[row, places] @ model.mvm.weight.T + model.mvm.bias
        wanted += -logits.log_softmax(-1)[torch.arange(len(places)), classes].mean()
    torch.testing.assert_close(sums["mrc"], wanted)
    gradients = torch.autograd.grad(sums["mrc"], model.mvm.weight)[0], torch.autograd.grad(wanted, model.mvm.weight)[0]
    torch.testing.assert_close(*gradients)


def test_codes_of_a_grid_are_classified_too(scenes):
    few = {"visual.dictionary": 16, "loss.mrc": 1.0, "loss.mfr": 0.0}
    settings = pretrain_settings(visual="grid", masking="random", overrides=few)
    model = narrow_model(scenes, family="grid", dictionary=16)
    batch = group_batches(scenes, model, settings.data, images=2, seed=0)[0]
    sums = Pretraining(settings).losses(model, batch)
    assert sums["mrc"] > 0 and "mfr" not in sums


# --------------------------------------------------------------------------------------- VL-BERT and Unified VLP


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    small = FusionSettings(layers=2, width=16, heads=2, feed_forward=32, whole_image=True)
    return build_fusion(small, vocabulary=40, vision_width=8, grid=2).eval()


def test_every_word_gets_the_whole_image_and_nothing_of_what_is_hidden(fusion):
    words, real = torch.randint(5, 40, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    features, seen = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    vision = fusion.embed_vision(VisualTokens(features))
    embed = fusion.bert.embeddings
    image = (
        torch.stack([vision[0].mean(0), vision[1, :2].mean(0)]) @ fusion.whole_image.weight.T + fusion.whole_image.bias
    )
    summed = embed.word_embeddings(words) + image[:, None] + embed.position_embeddings.weight[:4]
    summed = summed + embed.token_type_embeddings.weight[0]
    wanted = functional.layer_norm(summed, (16,), embed.LayerNorm.weight, embed.LayerNorm.bias, 1e-12)
    found = fusion(words, real, vision, seen)[0]
    torch.testing.assert_close(found[:, :4], wanted)
    hidden = torch.tensor([[True, False, False, False]] * 2)
    changed = features.clone()
    changed[:, 0] = 9.0
    both = (fusion.embed_vision(VisualTokens(one), hidden) for one in (features, changed))
    assert torch.equal(*(fusion(words, real, one, seen)[-1] for one in both))


def test_the_mask_of_seq2seq_is_unified_vlps():
    tokens = torch.tensor([[True] * 6, [True] * 3 + [False, True, True]])
    found = seq2seq_mask(tokens, 4, torch.tensor([True, True]))
    source = {0, 4, 5}  # [CLS] and the visual tokens
    for row in range(2):
        for query in range(6):
            sees = {key for key in range(6) if key in source or (query not in source and key <= query)}
            assert set(found[row, 0, query].nonzero()[:, 0].tolist()) == sees & set(
                tokens[row].nonzero()[:, 0].tolist()
            )
    plain = seq2seq_mask(tokens, 4, torch.tensor([False, False]))
    assert torch.equal(plain[:, 0], tokens[:, None].expand(-1, 6, -1))


def test_later_words_change_nothing_before_them(fusion):
    vision, real = fusion.embed_vision(VisualTokens(torch.randn(2, 4, 8))), torch.ones(2, 5, dtype=torch.bool)
    words = torch.randint(5, 40, (1, 5)).expand(2, -1)
    other = words.clone()
    other[:, 3] = (other[:, 3] + 1) % 40
    causal = torch.tensor([True, False])
    one, two = (fusion(given, real, vision, None, causal)[-1] for given in (words, other))
    same = (one == two).all(-1)
    assert same[0].tolist() == [True] * 3 + [False] * 2 + [True] * 4 and not same[1].any()
    torch.testing.assert_close(one[1:], fusion(words[1:], real[1:], vision[1:])[-1])


def test_the_share_of_seq2seq_is_drawn_evenly_and_not_by_the_mask(named_regions):
    class Drawn:
        noise = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))

    objective = Pretraining(settings_of("unified-vlp", named_regions))
    causal = objective.causal(Drawn).float()
    assert abs(causal.mean() - 0.75) < 0.01
    assert abs(torch.corrcoef(torch.stack([causal, Drawn.noise[:, 0]]))[0, 1]) < 0.02
    assert Pretraining(settings_of("", named_regions)).causal(Drawn) is None


@pytest.fixture
def writer(scenes):
    """Random weights, made sharper; texts of at most three words and their end."""
    model = narrow_model(scenes)
    torch.manual_seed(3)
    short = model.settings.model_copy(update={"text_tokens": 4})
    model = type(model)(short, model.tokenizer).eval()
    torch.nn.init.normal_(model.mlm_bias, std=0.5)
    return model


def next_words(model, image, ids):
    """Log probabilities of the word behind `ids`, special tokens but [SEP] left out."""
    words = torch.tensor([[*ids, model.tokenizer.mask_token_id]])
    joint = model.fuse(
        model.encode(image), words, torch.ones_like(words, dtype=torch.bool), causal=torch.tensor([True])
    )
    logits = model.word_logits(joint.text[0, -1])
    for special in set(model.tokenizer.all_special_ids) - {model.tokenizer.sep_token_id}:
        logits[special] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def test_captions_are_those_of_an_exhaustive_search(writer, scenes):
    images = input_of(writer.settings.visual).stack(scenes[:2])
    end, start = writer.tokenizer.sep_token_id, [writer.tokenizer.cls_token_id]
    greedy = write_captions(writer, images)
    for row, caption in enumerate(greedy):
        ids, total = start, 0.0
        while len(ids) < 4 and ids[-1] != end:
            scores = next_words(writer, images[row : row + 1], ids)
            ids, total = [*ids, int(scores.argmax())], total + float(scores.max())
        assert caption.text == writer.tokenizer.decode(ids, skip_special_tokens=True)
        assert caption.score == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert [one.text for one in write_captions(writer, images[1:])] == [greedy[1].text]
    beams, first = len(writer.tokenizer), next_words(writer, images[:1], start)
    ends = [(float(first[end]), [end])]  # with so many beams every first word stays open
    for word in first.argsort(descending=True)[:12].tolist():
        if word != end:
            second = next_words(writer, images[:1], [*start, word])
            ends.append((float(first[word] + second[end]) / 2, [word, end]))
    assert write_captions(writer, images[:1], beams=beams)[0].score >= max(ends)[0] - 1e-5
    with pytest.raises(ValueError, match="beams=0"):
        write_captions(writer, images, beams=0)


def test_the_end_of_a_text_is_hidden_only_on_demand(scenes):
    words = narrow_model(scenes).words
    ids = words.pad(["a ball", "a red ball"])
    special = {words.tokenizer.cls_token_id, words.tokenizer.pad_token_id, words.tokenizer.sep_token_id}
    assert (words.maskable(ids) == ~np.isin(ids, list(special))).all()
    assert (words.maskable(ids, ends=True) == ~np.isin(ids, list(special - {words.tokenizer.sep_token_id}))).all()
