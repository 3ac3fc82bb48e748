"""Right and wrong answers: which are shown, where the model looked, and that text is shown as text."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import narrow_model
from PIL import Image

from vpworkbench import figures
from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Example
from vpworkbench.studies.review import PREVIEW_PX, Reviewed, review
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel, TaskResult

HOSTILE = '<img src=x onerror=alert(1)> & "it\'s"'


def examples(scenes, count=6, sides=1) -> list[Example]:
    return [
        Example(str(n), tuple(scenes[n + side].image for side in range(sides)), scenes[n].captions[0], "val", "True")
        for n in range(count)
    ]


def result(scores) -> TaskResult:
    return TaskResult(
        TASKS["nlvr1"], np.array(scores), {str(n): "True" if s else "False" for n, s in enumerate(scores)}
    )


def rolled_out(model, pixels, text) -> np.ndarray:
    """[CLS]'s row of A^{1,L} on visual tokens, from the model's own eager maps."""
    inputs = model.prepare(pixels, [text])
    model.fusion.bert.set_attn_implementation("eager")
    maps = []
    for layer in model.fusion.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model(**inputs.forward)
    product = torch.eye(maps[0].shape[-1])
    for attention in maps:
        product = 0.5 * (torch.eye(len(product)) + attention[0].mean(dim=0)) @ product
    return product[0][inputs.vision[0]].numpy()


@pytest.mark.parametrize("task, sides", [("nlvr1", 1), ("nlvr2", 2)])
def test_as_many_right_as_wrong_with_the_rolled_out_attention_of_cls(scenes, task, sides):
    given, scores = examples(scenes, sides=sides), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    model = TaskModel(narrow_model(scenes), TASKS[task], ("False", "True"))
    found = review(model, given, result(scores), count=4)
    assert [one.right for one in found] == [True, True, False, False]
    assert [one.text for one in found] == [given[n].text for n in (0, 2, 1, 3)]
    pixels = torch.from_numpy(scenes[2 + sides - 1].image.pixels(96)).permute(2, 0, 1)[None]
    expected = rolled_out(narrow_model(scenes), pixels, given[2].text)
    np.testing.assert_allclose(found[1].attention[-1].ravel(), expected, atol=1e-5)


def test_previews_are_small_and_keep_their_proportions(scenes, tmp_path):
    Image.new("RGB", (800, 200), "red").save(tmp_path / "wide.png")
    wide = Example("0", (ImageFile(tmp_path, "wide.png"),), "a red square", "val", "True")
    (one,) = review(TaskModel(narrow_model(scenes), TASKS["nlvr1"], ("False", "True")), [wide], result([1.0]))
    assert one.images[0].shape == (PREVIEW_PX // 4, PREVIEW_PX, 3) and (one.images[0] == [255, 0, 0]).all()


def test_nothing_to_show_and_scores_of_other_examples(scenes):
    model = TaskModel(narrow_model(scenes), TASKS["nlvr1"], ("False", "True"))
    assert review(model, [], result([])) == []
    with pytest.raises(ValueError, match="shorter"):
        review(model, examples(scenes, 2), result([1.0]))
    with pytest.raises(ValueError, match="at least one"):
        figures.answers([])


def one(score: float) -> Reviewed:
    image = np.full((20, 30, 3), 200, dtype=np.uint8)
    attention = np.array([[0.5, 0.0], [0.1, 0.1]])
    return Reviewed(HOSTILE, "<b>yes</b>", "no", score, (image,), (attention,))


def test_the_page_needs_no_script_and_shows_text_as_text():
    page = figures.answers_page([one(1.0), one(0.0), one(float("nan"))], title=HOSTILE)
    assert "<script" not in page and "http" not in page and HOSTILE not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 2 + 3
    assert re.findall(r'article class="(\w+)"', page) == ["right", "wrong", "wrong"]
    assert "all (3)" in page and "right (1)" in page and page.count("wanted: &lt;b&gt;yes") == 1
    assert "the answer is withheld" in page


def test_the_sheet_is_bright_where_the_model_looked():
    figure = figures.answers([one(1.0), one(0.0)])
    assert "1 right and 1 wrong" in figure.layout.meta["alt"]
    assert not any("<img" in (note.text or "") for note in figure.layout.annotations)
    assert len([trace for trace in figure.data if trace.type == "image"]) == 2
