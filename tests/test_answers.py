"""Answers: maps equal those of generate with its cache, and without the image nothing is read from it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from probes.tiny_models import IMAGE, VIT, Family, Numbers, gemma3, llava, llava_with_processor, paligemma, pixels, qwen
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

from vpworkbench.answers import Answer, _words, probe_answer, read_answer, teacher_forced
from vpworkbench.huggingface import prompt_inputs
from vpworkbench.probes import modality_masks

QUESTION = "what is on the left"
ANSWER = [11, 12, 13, 14]


def one_prompt(family: Family, example: int) -> dict[str, torch.Tensor]:
    """The inputs of one example; the second one is padded on the left."""
    inputs = {name: value[example : example + 1] for name, value in family.inputs.items() if name != "pixel_values"}
    # transformers' own eager attention is nan beside padding in float64
    family.model.to(torch.float32 if example else torch.float64)
    pixels = family.inputs["pixel_values"].to(family.model.dtype)
    if "image_grid_thw" in inputs:
        counts = family.inputs["image_grid_thw"].prod(dim=1).tolist()
        return inputs | {"pixel_values": pixels.split(counts)[example]}
    return inputs | {"pixel_values": pixels[example : example + 1]}


@pytest.fixture(params=["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def family(request) -> Family:
    torch.manual_seed(0)
    makers = {"llava": llava, "gemma3": gemma3, "paligemma": paligemma, "qwen2_5_vl": lambda: qwen("qwen2_5_vl")}
    built = makers[request.param]()
    built.model.eval()
    for parameter in built.model.parameters():
        if not parameter.any() and parameter.ndim == 2:  # Gemma 3's projection of the image starts at zero
            parameter.data.normal_()
    return built


@pytest.mark.parametrize("example", [0, 1])
def test_maps_are_those_of_generate_with_a_cache(family, example):
    """Greedy steps in eager mode: each step's last row of attention, and its log probability."""
    model, inputs = family.model, one_prompt(family, example)
    model.set_attn_implementation("eager")
    made = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_attentions=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    ids = made.sequences[0, length:].tolist()
    answer = read_answer(model, inputs, ids, Numbers())
    assert answer.words == tuple(f" {number}" for number in ids) and len(answer.prompt) == length + 4
    for word, (maps, logits) in enumerate(zip(made.attentions, made.logits, strict=True)):
        for layer, weights in enumerate(maps):
            keys = weights.shape[-1]  # a sliding window keeps the last ones
            seen = answer.attention[word, layer, :, : length + word]
            torch.testing.assert_close(
                seen[:, -keys:].double(), weights[0, :, -1].double(), rtol=0, atol=[1e-5, 1e-4][example]
            )
            assert (seen[:, :-keys] == 0).all() and (answer.attention[word, layer, :, length + word :] == 0).all()
        log_probs = logits[0].double().log_softmax(dim=-1)
        assert abs(answer.log_probs[word] - log_probs[ids[word]]) <= 1e-4


def test_maps_and_roll_outs_equal_the_plain_eager_forward(family):
    model, inputs = family.model, one_prompt(family, 0)
    answer = read_answer(model, inputs, ANSWER, Numbers())
    model.set_attn_implementation("eager")
    forced = teacher_forced(model, inputs, ANSWER)
    with torch.no_grad():
        maps = model(**forced, output_attentions=True).attentions
    length = forced["input_ids"].shape[1]
    rows = slice(length - len(ANSWER) - 1, length - 1)
    product = torch.eye(length, dtype=torch.float64)
    vision = modality_masks(model, forced).vision[0]
    for layer, weights in enumerate(maps):
        torch.testing.assert_close(
            answer.attention[:, layer], weights[0, :, rows].transpose(0, 1).float(), rtol=0, atol=1e-5
        )
        product = (torch.eye(length) + weights[0].double().mean(dim=0)) / 2 @ product
        torch.testing.assert_close(answer.rolled[:, layer].double(), product[rows], rtol=0, atol=1e-5)
        share = weights[0, :, rows][..., vision].sum(dim=-1).mean(dim=0)
        torch.testing.assert_close(answer.image_share[:, layer], share.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        answer.map(1, layer=0, head=2), maps[0][0, 2, rows][1, vision].float(), rtol=0, atol=1e-5
    )
    assert answer.map(0, rolled=True).shape == answer.map(0).shape == (int(vision.sum()),)
    assert answer.boxes.shape == (int(vision.sum()), 4)


def test_with_the_image_blocked_everywhere_another_image_changes_nothing(family):
    inputs = one_prompt(family, 0)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0, -1)}
    one, another = (read_answer(family.model, given, ANSWER, Numbers(), spans=[(1, 1)]) for given in (inputs, other))
    assert one.blocked[0].equal(another.blocked[0])
    assert not one.log_probs.equal(another.log_probs) and not one.blocked[1].equal(another.blocked[1])
    assert one.from_image.equal(one.log_probs - one.blocked[0]) and one.spans == ((0, 2), (1, 1))


def test_uniform_attention_gives_the_null():
    """All keys alike: every share of the image is its null, and a word sees only what precedes it."""
    torch.manual_seed(0)
    family = llava()
    family.model.eval()
    for layer in family.model.model.language_model.layers:
        layer.self_attn.k_proj.weight.data.zero_()
    answer = read_answer(family.model, one_prompt(family, 1), ANSWER, Numbers())
    torch.testing.assert_close(answer.image_share, answer.null, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.null[0, 0], torch.tensor(9 / 13))


# --- with a processor ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_processor() -> tuple[torch.nn.Module, hf.LlavaProcessor]:
    return llava_with_processor(QUESTION)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)


def test_a_given_answer_of_a_hub_model(with_processor):
    answer = probe_answer(*with_processor, picture(0), QUESTION, answer="a red ball")
    assert isinstance(answer, Answer) and [word.strip() for word in answer.words] == ["a", "red", "ball"]
    assert answer.masks.vision.sum() == 9 and answer.masks.placed.sum() == 9
    attended = answer.most_attended(1, 3)
    assert len(attended) == 3 and all("<image>" not in token for token, _ in attended)
    assert [share for _, share in attended] == sorted((share for _, share in attended), reverse=True)
    another = probe_answer(*with_processor, picture(1), QUESTION, answer="a red ball")
    assert another.blocked.equal(answer.blocked) and another.prior.equal(answer.prior)
    assert not another.log_probs.equal(answer.log_probs)


def test_a_letter_of_several_tokens_is_whole():
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("é 😀!")["input_ids"]
    assert _words(fast, ids) == ("", "é", " ", "", "", "", "😀", "!")
    assert _words(fast, ids[:-2]) == ("", "é", " ", "", "", "\ufffd")  # the answer ends inside it


def test_a_processor_that_puts_its_image_tokens_in_itself_gets_the_text_alone():
    vocabulary = {word: at for at, word in enumerate(["<unk>", "<image>", "what", "is"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    processor = hf.Blip2Processor(hf.BlipImageProcessor(size={"height": 24, "width": 24}), fast, num_query_tokens=4)
    made = prompt_inputs(processor, [Image.fromarray(picture(0))], "what is", torch.device("cpu"))
    assert made["input_ids"].tolist() == [[1, 1, 1, 1, 2, 3]]


def test_a_generated_answer_and_several_images(with_processor):
    model, processor = with_processor
    answer = probe_answer(model, processor, [picture(0), picture(1)], QUESTION, max_new_tokens=3)
    assert 1 <= len(answer.words) <= 3 and answer.masks.vision.sum() == 18
    assert answer.masks.image[answer.masks.vision].tolist() == [0] * 9 + [1] * 9
    assert answer.text == "".join(answer.words).strip()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processor": None}, "NoneType has no tokenizer"),
        ({"image": "missing.jpg"}, "missing.jpg: image missing"),
        ({"image": np.zeros((4, 4, 3))}, r"an array of float64, \(4, 4, 3\), is no image"),
        ({"image": 7}, "int is no image"),
        ({"image": []}, "no image tokens: give an image"),
        ({"question": None}, "each be one text"),
        ({"answer": ["a"]}, "each be one text"),
        ({"answer": "a red ball " * 1000}, "give a shorter text"),
    ],
)
def test_bad_input_is_one_clear_line(with_processor, given, message):
    model, processor = with_processor
    wanted = {"processor": processor, "image": picture(0), "question": QUESTION, "answer": "a"} | given
    with pytest.raises((ValueError, TypeError), match=message):
        probe_answer(model, **wanted)


def test_refusals(with_processor, family):
    with pytest.raises(ValueError, match="the answer is empty"):
        probe_answer(*with_processor, picture(0), QUESTION, answer="")
    with pytest.raises(ValueError, match="inputs hold 2 prompts"):
        read_answer(family.model, family.inputs, ANSWER, Numbers())


# --- memory --------------------------------------------------------------------------------------


def print_peak(what: str) -> None:
    """MiB that a process of its own took at most: 4,096 tokens through 12 layers, plainly or probed."""
    text = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT | {"image_size": 192}),
        text_config=hf.LlamaConfig(vocab_size=32_000, max_position_embeddings=4096, **text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    model, ids = hf.LlavaForConditionalGeneration(config).eval(), torch.full((1, 4092), 100)
    ids[0, 1:577] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1, 3, 192, 192)}
    with torch.no_grad():
        if what == "plain":
            model(**inputs | {"use_cache": False})
        else:
            read_answer(model, inputs, ANSWER, Numbers())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@pytest.mark.slow
def test_memory_is_at_most_a_third_above_the_plain_forward():
    peaks = []
    for what in ("plain", "answer"):
        code = f"from test_answers import print_peak; print_peak({what!r})"
        run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks.append(float(run.stdout.split()[-1]))
    assert peaks[1] <= 1.3 * peaks[0], peaks
