"""The lens against each model's own last steps, applied by hand to the states that it reports."""

import pytest
import torch
from probes.tiny_models import FAMILIES, llava, lxmert
from torch import nn
from transformers import BertConfig, BertModel

from vpworkbench.data.inputs import prepare
from vpworkbench.probes import hidden_states, lens, modality_masks, words_by_layer
from vpworkbench.probes.readouts import match_log_odds
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel


@pytest.fixture
def inputs(model, scenes):
    return prepare(model, scenes[:3], [f"{picture.captions[0]} [MASK]" for picture in scenes[:3]])


def all_logits(outputs):
    return outputs.logits


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "idefics3"])
def test_a_decoder_speaks_through_its_norm_and_output_embedding(name):
    torch.manual_seed(0)
    model, inputs, _ = FAMILIES[name]()
    model.eval()
    decoded = lens(model, inputs, all_logits, tokens=modality_masks(model, inputs).tokens)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        *states, last = plain.hidden_states  # transformers applies the norm to the last one
        norm = (model.model.text_model if name == "idefics3" else model.model.language_model).norm
        expected = model.lm_head(torch.stack([*map(norm, states), last], dim=1))
    torch.testing.assert_close(decoded, expected)
    assert decoded[:, -1].equal(plain.logits)


def test_asked_positions_are_those_of_all_logits():
    torch.manual_seed(0)
    model, inputs, _ = llava()
    model.eval()
    everywhere = lens(model, inputs, all_logits)  # the vision tower is not asked
    asked = lens(model, {**inputs, "logits_to_keep": torch.tensor([3, 14])}, all_logits, layers="model.language_model")
    torch.testing.assert_close(asked, everywhere[:, :, [3, 14]])


def test_heads_of_ours_read_every_layer(model, inputs):
    with torch.no_grad():
        joint = model(**inputs.forward)
        matched = torch.stack([model.itm(state[:, 0]) for state in joint.hidden], dim=1)
        words = torch.stack([model.word_logits(state[:, : joint.words]) for state in joint.hidden], dim=1)
    decoded = lens(model, inputs.forward, lambda joint: model.itm(joint.cls))
    torch.testing.assert_close(decoded, matched)
    assert decoded.shape == (3, 3, 2) and decoded[:, -1].equal(model.itm(joint.cls))
    log_odds = lens(model, inputs.forward, match_log_odds(model))
    torch.testing.assert_close(log_odds, matched[..., 1] - matched[..., 0])
    decoded = lens(model, inputs.forward, lambda joint: model.word_logits(joint.text), tokens=inputs.tokens)
    torch.testing.assert_close(decoded, words)
    assert decoded[:, -1].equal(model.word_logits(joint.text))
    second = lens(model, inputs.forward, lambda joint: joint.hidden[1])  # later layers repeat the last state
    torch.testing.assert_close(second, torch.stack([joint.hidden[layer] for layer in (0, 1, 1)], dim=1))


def test_a_fine_tuned_model_answers_from_every_layer(model, inputs):
    torch.manual_seed(1)
    task_model = TaskModel(model, TASKS["snli-ve"], ("yes", "maybe", "no")).eval()
    images, words, word_tokens = inputs.forward.values()
    forward = {"images": images, "image_index": torch.arange(3)[:, None], "words": words, "word_tokens": word_tokens}
    answers = lens(task_model, forward, lambda logits: logits)
    with torch.no_grad():
        hidden = model(**inputs.forward).hidden
        expected = torch.stack([task_model.head(state[:, 0]) for state in hidden], dim=1)
        assert answers[:, -1].equal(task_model(**forward))
    torch.testing.assert_close(answers, expected)


@pytest.mark.parametrize("name", ["vilt", "visual_bert"])
def test_encoders_of_transformers_end_earlier_too(name):
    """ViLT shuffles its patches, in the same order for every layer; VisualBERT's layers return tuples."""
    torch.manual_seed(0)
    model, inputs, _ = FAMILIES[name]()
    model.eval()
    decoded = lens(
        model, inputs, lambda outputs: outputs.last_hidden_state, tokens=modality_masks(model, inputs).tokens
    )
    states = hidden_states(model, inputs)
    finish = getattr(model, "layernorm", nn.Identity())
    torch.testing.assert_close(decoded, torch.stack([finish(state) for state in states], dim=1))


def test_the_table_word_by_layer(model, inputs):
    decoded = lens(model, inputs.forward, lambda joint: model.word_logits(joint.text[:, [2, 4]]))
    table = words_by_layer(decoded[0], model.tokenizer.decode, top=3)
    assert [len(table), len(table[0]), len(table[0][0])] == [3, 2, 3]
    for layer in range(3):
        for position in range(2):
            shares = decoded[0, layer, position].softmax(dim=-1).sort(descending=True)
            words = model.tokenizer.convert_ids_to_tokens(shares.indices[:3].tolist())
            assert [word for word, _ in table[layer][position]] == words
            assert [share for _, share in table[layer][position]] == pytest.approx(shares.values[:3].tolist())


def test_the_model_is_as_before_also_after_an_exception(model, inputs):
    layers = model.fusion.bert.encoder.layer
    own = layers[1].forward
    layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's, where a model is split
    given = layers[1].forward
    before = [dict(vars(layer)) for layer in layers]

    def fail(joint):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        lens(model, inputs.forward, fail)
    lens(model, inputs.forward, lambda joint: joint.cls)
    assert [dict(vars(layer)) for layer in layers] == before and layers[1].forward is given


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        self.bert = BertModel(BertConfig(vocab_size=50, **small))

    def forward(self, input_ids):
        return self.bert(input_ids).last_hidden_state + self.bert(input_ids.flip(1)).last_hidden_state


def test_refusals(model, inputs):
    for readout, given in ((lambda joint: joint.cls[0], r"\(32,\)"), (lambda joint: 1.0, "float")):
        with pytest.raises(ValueError, match=rf"must give a tensor \(3, ...\), .* not {given}"):
            lens(model, inputs.forward, readout)
    with pytest.raises(ValueError, match="runs its 2 layers 4 times in one forward"):
        lens(Twice().eval(), {"input_ids": torch.ones(1, 5, dtype=torch.long)}, lambda state: state)
    family = lxmert()
    with pytest.raises(ValueError, match="LxmertModel has two streams of states: this probe needs one"):
        lens(family.model.eval(), family.inputs, lambda outputs: outputs.pooled_output)
    with pytest.raises(ValueError, match="dropout is left on"):
        lens(model.train(), inputs.forward, lambda joint: joint.cls)
