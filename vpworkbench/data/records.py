"""Records: an image with its texts, for pre-training and retrieval; an example of a downstream task."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vpworkbench.data.images import ImageFile
from vpworkbench.data.instances import InstanceMasks
from vpworkbench.data.nlvr1 import Box
from vpworkbench.scenes.language import decide
from vpworkbench.scenes.scene import Scene


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and its texts.

    Attributes
    ----------
    id : str
        Unique within its set.
    split : str
        `train`, `val` or `test`.
    captions, foils : tuple of str
        Texts that are true, and texts that are false, as the set states.
    scene : Scene or None
        The ground truth of a generated image; None elsewhere.
    boxes : tuple of Box
        The ground truth of an NLVR v1 image, its structured representation; empty elsewhere.
    instances : InstanceMasks or None
        The objects that COCO's annotators outlined in a photograph, read when they are asked for; None elsewhere.
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
    instances: InstanceMasks | None = None
    origins: frozenset[str] = frozenset()

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """Its one image, as an `Example` has them."""
        return (self.image,)

    @property
    def has_objects(self) -> bool:
        """True if it is known where its objects are."""
        return self.scene is not None or self.instances is not None

    def object_map(self) -> np.ndarray:
        """Number of the object visible at each pixel, (height, width), 0 in the background; in its original size.

        In a generated image i + 1 is `scene.things[i]`, in a photograph `instances.names()[i]`.
        """
        if self.instances is not None:
            return self.instances.object_map()
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
        From the release; unique within its file.
    images : tuple of ImageFile
        One, or two for a statement about a pair.
    text : str
        Question, statement or hypothesis.
    split : str
        `train`, `val` or `test`.
    label : str or None
        `True`, `False`, `entailment` and so on; None if the release withholds it, and for questions.
    answers : tuple of str
        Ten people's answers to a question, as they wrote them; empty if the release withholds them.
    answer : str
        The answer that the release chose among these; empty if it chose none.
    kind : str
        VQA's answer type; of NLVR2 the subset, `balanced` or `unbalanced`.
    boxes, origins
        See `Picture`; without origins for two images.
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


def _is_among(text: str, texts: tuple[str, ...]) -> bool:
    """Whether `text` is one of `texts`; case does not count, because the tokenizer ignores it."""
    return text.lower() in (other.lower() for other in texts)
