"""Groups of tokens for patching minimal pairs: in our families, and in a model of transformers."""

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import narrow_model

from vpworkbench.data.minimal_pairs import PicturePair, load_pairs
from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.data.regions import write_regions
from vpworkbench.model.words import build_tokenizer
from vpworkbench.probes import patch
from vpworkbench.probes.readouts import match_log_odds
from vpworkbench.settings import PairSettings
from vpworkbench.studies.patching import PatchInputs, patch_inputs
from vpworkbench.subjects import load

GROUPS = ["object that differs", "other image tokens", "word that differs", "other words", "[CLS]"]


@pytest.fixture(scope="module")
def pairs(scratch) -> list[PicturePair]:
    return load_pairs(PairSettings(pairs=12, seed=2))


@pytest.fixture
def pictures(pairs, scenes):
    """Their captions hold every word of the pairs."""
    return [*scenes, *(picture for pair in pairs for picture in pair.pictures)] * 2


def assert_partition(found: PatchInputs, tokens: torch.Tensor) -> None:
    """Each real token is in one group."""
    assert list(found.groups) == GROUPS
    assert torch.equal(torch.stack(list(found.groups.values())).int().sum(dim=0), tokens.int())


def test_groups_lie_on_the_thing_and_on_the_word(pairs, pictures):
    subject = load(narrow_model(pictures))
    firsts, seconds = zip(*(pair.pictures for pair in pairs), strict=True)
    clean, other = (subject.prepare(firsts, [pair.texts[side] for pair in pairs]) for side in (0, 1))
    found = patch_inputs(subject, pairs)
    assert_partition(found, clean.tokens)
    words = clean.forward["words"].shape[1]
    numbers = torch.tensor([[pair.thing + 1] for pair in pairs])
    on_thing = (objects_of_pictures(firsts, 6) == numbers) | (objects_of_pictures(seconds, 6) == numbers)
    assert torch.equal(found.groups["object that differs"][:, words:], on_thing) and on_thing.any(dim=1).all()
    changed = clean.forward["words"] != other.forward["words"]
    assert torch.equal(found.groups["word that differs"][:, :words], changed) and (changed.sum(dim=1) == 1).all()
    assert found.groups["[CLS]"].nonzero().tolist() == [[example, 0] for example in range(12)]


def test_the_image_or_the_text_is_corrupt(pairs, pictures):
    subject = load(narrow_model(pictures))
    odds = match_log_odds(subject.base)
    for corrupt, whole in (("image", {"object that differs", "other image tokens"}), ("text", {"word that differs"})):
        found = patch_inputs(subject, pairs, corrupt=corrupt)
        same = {name: torch.equal(found.clean[name], found.corrupt[name]) for name in found.clean}
        assert same == {"images": corrupt == "text", "words": corrupt == "image", "word_tokens": True}
        together = torch.stack([found.groups[name] for name in whole]).any(dim=0)
        rest = torch.stack([found.groups[name] for name in found.groups if name not in whole]).any(dim=0)
        restored = patch(subject.model, found.clean, found.corrupt, odds, {"whole": together, "rest": rest}).restored
        assert (restored[:, 0, 0] == 1).all() and (restored[:, 0, 1] == 0).all()


def test_regions_are_found_by_their_boxes(pairs, pictures, tmp_path):
    """Of a model that reads the true boxes, the region of the thing that differs is patched."""
    rng = np.random.default_rng(0)
    for picture in (picture for pair in pairs for picture in pair.pictures):
        boxes = [thing.box for thing in picture.scene.things]
        file = (tmp_path / picture.image.name).with_suffix(".npz")
        write_regions(file, rng.normal(size=(len(boxes), 12)), boxes, (96, 96))
    subject = load(narrow_model(pictures, family="regions", regions=8, region_width=12, region_files=str(tmp_path)))
    found = patch_inputs(subject, pairs[:5])  # of these, the scenes of a pair have as many things
    assert_partition(
        found, subject.prepare([pair.pictures[0] for pair in pairs[:5]], [pair.texts[0] for pair in pairs[:5]]).tokens
    )
    assert (found.groups["object that differs"].sum(dim=1) >= 1).all()


def test_a_model_of_transformers_has_the_same_groups(pairs, pictures, tmp_path):
    tokenizer = build_tokenizer([text for picture in pictures for text in picture.captions])
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = hf.ViltConfig(**sizes, vocab_size=len(tokenizer), image_size=96, patch_size=16)
    hf.ViltModel(config).save_pretrained(tmp_path)
    hf.ViltProcessor(hf.ViltImageProcessor(size={"shortest_edge": 96}, size_divisor=16), tokenizer).save_pretrained(
        tmp_path
    )
    subject = load(str(tmp_path))
    found = patch_inputs(subject, pairs)
    assert_partition(
        found, subject.prepare([pair.pictures[0] for pair in pairs], [pair.texts[0] for pair in pairs]).tokens
    )
    assert (found.groups["word that differs"].sum(dim=1) == 1).all()
    numbers = torch.tensor([[pair.thing + 1] for pair in pairs])
    on_thing = torch.stack(
        [objects_of_pictures([pair.pictures[side] for pair in pairs], 6) == numbers for side in (0, 1)]
    )
    assert torch.equal(found.groups["object that differs"].sum(dim=1), on_thing.any(dim=0).sum(dim=1))


def test_words_of_different_lengths_are_refused(pairs, scenes):
    model = narrow_model(scenes[:2])  # its vocabulary lacks many words
    with pytest.raises(ValueError, match="makes different numbers of tokens of the two texts of a pair"):
        patch_inputs(load(model), pairs)
