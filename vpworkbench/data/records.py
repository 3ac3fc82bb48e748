"""What one example is: an image on disk, and the texts true of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vpworkbench.data.images import ImageFile
from vpworkbench.data.nlvr1 import Box
from vpworkbench.scenes.language import decide
from vpworkbench.scenes.scene import Scene


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and what is said of it.

    Attributes
    ----------
    id : str
        Unique within its set.
    split : str
        `train`, `val` or `test`.
    captions, foils : tuple of str
        Texts stated as true, and as false, of the image.
    scene : Scene or None
        The ground truth of a generated image; None elsewhere.
    boxes : tuple of Box
        The ground truth of an NLVR v1 image, its structured representation; empty elsewhere.
    origins : frozenset of str
        The photograph's ids in the collections that sets draw from: `coco:391895`, `flickr:8119368305`.
    """

    id: str
    image: ImageFile
    split: str
    captions: tuple[str, ...]
    foils: tuple[str, ...] = ()
    scene: Scene | None = None
    boxes: tuple[Box, ...] = ()
    origins: frozenset[str] = frozenset()

    def object_map(self) -> np.ndarray:
        """uint8 (height, width) of a generated image: 0 background, i + 1 where `scene.things[i]` is seen."""
        folder = self.image.folder.with_name("object_maps.zip")
        data = ImageFile(folder, self.image.name.replace("images/", "object_maps/", 1)).read()
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image)

    def denies(self, text: str) -> bool:
        """Whether `text` may serve as an unmatched text of this image.

        In generated scenes the text must be false. Elsewhere any text will do that is not one of the image's captions,
        as is usual in the field.
        """
        if _is_among(text, self.captions):
            return False
        if _is_among(text, self.foils):
            return True
        return self.scene is None or decide(text, self.scene) is False

    def affirms(self, text: str) -> bool:
        """Whether `text` is known to be true of this image."""
        return _is_among(text, self.captions) or (self.scene is not None and decide(text, self.scene) is True)


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a downstream task.

    Attributes
    ----------
    id : str
        As the release numbers it; unique within its file.
    images : tuple of ImageFile
        One, or two for a statement about a pair.
    text : str
        Question, statement or hypothesis.
    split : str
        `train`, `val` or `test`.
    label : str or None
        `True` / `False`, `entailment` and so on; None where the release withholds it, and for questions.
    answers : tuple of str
        People's answers to a question, as they wrote them; empty where the release withholds them.
    answer : str
        The one that stands for them, as the release tells it; empty: the most given one.
    kind : str
        VQA's answer type.
    boxes : tuple of Box
        What NLVR v1's structured representation draws; empty elsewhere.
    origins : frozenset of str
        As a picture's; none where there are two images.
    """

    id: str
    images: tuple[ImageFile, ...]
    text: str
    split: str
    label: str | None = None
    answers: tuple[str, ...] = ()
    answer: str = ""
    kind: str = ""
    boxes: tuple[Box, ...] = ()
    origins: frozenset[str] = frozenset()


Record = Picture | Example


def images_of(record: Record) -> tuple[ImageFile, ...]:
    """The image of a picture, the one or two of an example."""
    return (record.image,) if isinstance(record, Picture) else record.images


def _is_among(text: str, texts: tuple[str, ...]) -> bool:
    """Case does not count: the tokenizer would make the same words of both."""
    return text.lower() in (other.lower() for other in texts)
