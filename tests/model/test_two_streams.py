"""The two-stream fusion against the formulas written out, and what the probes say of it."""

from __future__ import annotations

import pytest
import torch
from conftest import narrow_model
from torch import nn
from transformers import BertConfig, BertModel

from vpworkbench.data.inputs import prepare
from vpworkbench.data.minimal_pairs import load_pairs
from vpworkbench.explorer.readings import read
from vpworkbench.model.fusion import FUSIONS, build_fusion
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.readouts import write_captions
from vpworkbench.model.visual import VisualTokens
from vpworkbench.model.weights import start_text
from vpworkbench.probes import hidden_states, inter_modality_flow, knock_out, lens, patch
from vpworkbench.probes.readouts import match_log_odds
from vpworkbench.settings import FusionSettings, ModelSettings, PairSettings
from vpworkbench.studies.patching import patch_inputs
from vpworkbench.subjects import load

SETTINGS = FusionSettings(kind="two-stream", layers=3, width=16, heads=2, feed_forward=32, positions=64, dropout=0.0)


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    made = build_fusion(SETTINGS, vocabulary=40, vision_width=8, grid=2).eval()
    for parameter in made.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def model(scenes) -> VisualParsingModel:
    return two_streams(scenes)


def two_streams(pictures) -> VisualParsingModel:
    one = narrow_model(pictures)
    torch.manual_seed(1)
    kind = one.settings.fusion.model_copy(update={"kind": "two-stream", "layers": 3})
    return VisualParsingModel(ModelSettings(**{**dict(one.settings), "fusion": kind}), one.tokenizer).eval()


def naive_layer(layer, words, image, real):
    """Cross attention both ways by one set of weights, self attention, feed forward; one example, real tokens only."""

    def attend(weights, queries, context):
        heads = [(part.weight.double(), part.bias.double()) for part in (weights.query, weights.key, weights.value)]
        query, key, value = ((given @ w.T + b).unflatten(-1, (2, 8)).transpose(0, 1)
                             for given, (w, b) in zip((queries, context, context), heads, strict=True))  # fmt: skip
        return ((query @ key.transpose(1, 2) / 8**0.5).softmax(-1) @ value).transpose(0, 1).flatten(1)

    def added(part, new, old):
        total = new @ part.dense.weight.double().T + part.dense.bias.double() + old
        centred = total - total.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * part.LayerNorm.weight.double() + part.LayerNorm.bias.double()

    words, image = words[real], image
    cross, outputs = layer.visual_attention, []
    met = [added(cross.output, attend(cross.att, own, other), own) for own, other in ((words, image), (image, words))]
    inside = (layer.lang_self_att, layer.lang_inter, layer.lang_output), (layer.visn_self_att, layer.visn_inter,
                                                                          layer.visn_output)  # fmt: skip
    for state, (own, inner, outer) in zip(met, inside, strict=True):
        state = added(own.output, attend(own.self, state, state), state)
        wide = nn.functional.gelu(state @ inner.dense.weight.double().T + inner.dense.bias.double())
        outputs.append(added(outer, wide, state))
    return outputs


@torch.no_grad()
def test_the_streams_meet_by_the_formula_and_padding_changes_nothing(fusion):
    words, real = torch.randint(5, 40, (2, 5)), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    vision = fusion.embed_vision(VisualTokens(torch.randn(2, 4, 8)))
    states = fusion(words, real, vision)
    assert len(states) == 1 + 2 and len(fusion.bert.encoder.layer) == 1  # one layer on words only, two that meet
    text = fusion.bert(words, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(states[0][:, :5][real], text[real])
    assert torch.equal(states[0][:, 5:], vision)
    for layer, before, after in zip(fusion.meeting, states, states[1:], strict=False):
        for row in range(2):
            wanted = naive_layer(layer, before[row, :5].double(), before[row, 5:].double(), real[row])
            torch.testing.assert_close(after[row, :5][real[row]].double(), wanted[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after[row, 5:].double(), wanted[1], rtol=1e-4, atol=1e-4)
    short = fusion(words[1:, :3], real[1:, :3], vision[1:])[-1]
    torch.testing.assert_close(short[:, 3:], states[-1][1:, 5:], rtol=0, atol=1e-5)
    torch.testing.assert_close(fusion.cls_output(words, real, vision), states[-1][:, 0])
    more = torch.cat([vision, torch.randn(2, 3, 16)], dim=1), torch.arange(7)[None].expand(2, 7) < 4
    torch.testing.assert_close(fusion(words, real, *more)[-1][:, :9], states[-1], rtol=0, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(fusion):
    words, vision = torch.randint(5, 40, (2, 5)), torch.randn(2, 4, 16)
    gradients = []
    for on in (False, True):
        fusion.zero_grad()
        fusion.set_grad_checkpointing(on)
        fusion(words, torch.ones(2, 5, dtype=torch.bool), vision)[-1].square().sum().backward()
        gradients.append(fusion.meeting[0].visual_attention.att.key.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_bert_starts_the_stream_of_words(fusion, tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    donor = BertModel(config)
    donor.save_pretrained(tmp_path)
    report = start_text(fusion, str(tmp_path))
    assert not report.missing
    own, met = fusion.bert.encoder.layer[0], fusion.meeting[1]
    first, third = donor.encoder.layer[0], donor.encoder.layer[2]
    pairs = (own.output.dense, first.output.dense), (met.lang_self_att.self.key, third.attention.self.key)
    pairs += (
        (met.lang_self_att.output.dense, third.attention.output.dense),
        (met.lang_inter.dense, third.intermediate.dense),
    )
    for ours, theirs in (*pairs, (met.lang_output.LayerNorm, third.output.LayerNorm)):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_a_saved_model_is_probed_and_explored_like_any(model, scenes, tmp_path):
    model.save_pretrained(tmp_path)
    again = VisualParsingModel.from_pretrained(tmp_path)
    inputs = prepare(again, scenes[:2], [picture.captions[0] for picture in scenes[:2]])
    joint = again(**inputs.forward)
    assert torch.equal(joint.cls, model(**inputs.forward).cls)
    states = hidden_states(again, inputs.forward, tokens=inputs.tokens)
    torch.testing.assert_close(states, joint.hidden, rtol=1e-5, atol=1e-5)
    reading = read(load(again), scenes[0], scenes[0].captions[0])
    assert reading.layers == 4 and len(reading.hidden) == 3
    torch.testing.assert_close(reading.attention.sum(-1), torch.ones_like(reading.attention[..., 0]))


def test_flow_is_a_constant_and_what_blocking_costs_is_not(model, scenes):
    texts = [picture.captions[0] for picture in scenes[:2]]
    inputs = prepare(model, scenes[:2], texts)
    sets = {"vision": inputs.vision, "tokens": inputs.tokens, "language": inputs.language}
    found = [inter_modality_flow(model, inputs.forward, **sets).flow]
    readout = match_log_odds(model)
    lost = [knock_out(model, inputs.forward, **sets, readout=readout, spans="triangle").effect]
    for parameter in model.fusion.parameters():
        nn.init.normal_(parameter, std=0.2)
    found.append(inter_modality_flow(model, inputs.forward, **sets).flow)
    lost.append(knock_out(model, inputs.forward, **sets, readout=readout, spans="triangle").effect)
    torch.testing.assert_close(*found, equal_nan=True)  # whatever the weights are
    within = found[0].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within, torch.tensor([0.5, 0.0, 0.5, 0.0]).to(within).expand(2, 4))
    assert lost[0].shape == (2, 10) and (lost[0][:, 0] != 0).all() and (lost[0] - lost[1]).abs().max() > 0.01
    everywhere = knock_out(model, inputs.forward, **sets, readout=readout, spans=[(0, 3)]).after
    other = prepare(model, scenes[2:4], texts)
    assert torch.equal(knock_out(model, other.forward, **sets, readout=readout, spans=[(0, 3)]).after, everywhere)


def test_the_lens_and_patching_use_the_joint_states(model, scenes):
    texts = [picture.captions[0] for picture in scenes[:2]]
    clean, corrupt = prepare(model, scenes[:2], texts), prepare(model, scenes[2:4], texts)
    decoded = lens(model, clean.forward, lambda joint: joint.cls, tokens=clean.tokens)
    hidden = model(**clean.forward).hidden
    torch.testing.assert_close(decoded, torch.stack([state[:, 0] for state in hidden], dim=1))
    restored = patch(model, clean.forward, corrupt.forward, match_log_odds(model), {"all": clean.tokens}).restored
    assert restored.shape == (2, 2, 1)
    torch.testing.assert_close(restored, torch.ones_like(restored))


def test_the_words_of_minimal_pairs_are_told_by_their_ids(scenes):
    """The first joint state comes after layers on words, in which all words differ."""
    pairs = load_pairs(PairSettings(pairs=6, seed=2))
    pictures = [*scenes, *(picture for pair in pairs for picture in pair.pictures)] * 2
    found = patch_inputs(load(two_streams(pictures)), pairs).groups
    assert found["word that differs"].sum(dim=1).tolist() == [1] * 6 and found["other words"].any(dim=1).all()


def test_it_writes_no_captions(model, scenes):
    with pytest.raises(ValueError, match="two streams cannot write captions"):
        write_captions(model, prepare(model, scenes[:1], ["a"]).forward["images"])


def test_the_kinds_are_those_of_the_setting():
    assert list(FUSIONS) == list(FusionSettings.model_fields["kind"].annotation.__args__)
