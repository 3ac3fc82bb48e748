"""Models side by side on the same pictures and captions: ours, and any of transformers by its own processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vpworkbench.config import CompareSettings
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out
from vpworkbench.model import CheckpointError
from vpworkbench.pretrain import load_run
from vpworkbench.probes import modality_masks
from vpworkbench.probes.dataset import Probed, probe_dataset

NEEDS_REGIONS = ("lxmert", "visual_bert")
LARGEST_BATCH = 16


class Prepared(NamedTuple):
    """A batch that a probe reads: `ProbeInputs`."""

    forward: dict[str, Any]
    vision: Tensor
    tokens: Tensor
    language: Tensor


class Opened(NamedTuple):
    """A model under comparison.

    Attributes
    ----------
    name : str
        As in figures and tables.
    prepare : callable
        (pictures, texts) -> ProbeInputs, picture i with text i.
    batch : int
        Pairs in one pass.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Sequence[Picture], list[str]], Any]
    batch: int


def open_model(source: str) -> Opened:
    """A model by the name of a run or a checkpoint of ours, or by a path or name that transformers knows.

    Parameters
    ----------
    source : str
        Empty: the tiny model that ships. A name of transformers is looked for in its local cache and, where there is a
        network, on the hub.

    Raises
    ------
    CheckpointError
        If it is neither, or cannot be given images (region features are made elsewhere).
    """
    if _is_transformers(source):
        return _of_transformers(source)
    try:
        model, _ = load_run(source)
    except CheckpointError as ours:
        try:
            return _of_transformers(source)
        except CheckpointError as theirs:
            raise CheckpointError(f"{ours}; and transformers: {theirs}") from None
    name = source or "shipped"
    return Opened(Path(name).name if "/" in name else name, model, model.prepare, LARGEST_BATCH)


def open_models(sources: Sequence[str]) -> list[Opened]:
    """All models, each under a name of its own, before any is probed."""
    subjects: list[Opened] = []
    for source in sources:
        subject = open_model(source)
        taken = [other.name for other in subjects]
        if subject.name in taken:
            subject = subject._replace(name=f"{subject.name} ({len(taken) + 1})")
        subjects.append(subject)
    return subjects


def held_out(settings: CompareSettings) -> list[Picture]:
    """The held-out pictures on which all models are compared, each with a caption."""
    return [picture for picture in load_held_out(settings.data) if picture.captions][: settings.images]


def probe_all(
    subjects: Sequence[Opened],
    pictures: Sequence[Picture],
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Probed]:
    """Probe every model on the same pictures, each with its first caption; by the models' names.

    Parameters
    ----------
    folder : Path or None
        Takes one folder for each model; a stopped call goes on where it was.
    """
    found = {}
    for number, subject in enumerate(subjects):
        parts = [pictures[start : start + subject.batch] for start in range(0, len(pictures), subject.batch)]
        found[subject.name] = probe_dataset(
            subject.model.eval(),
            _batches(subject, parts),
            total=len(parts),
            folder=None if folder is None else folder / f"model-{number}",
            config={"model": subject.name, "images": len(pictures)},
            examples=[f"{place}/{picture.id}" for place, picture in enumerate(pictures)],
            seed=seed,
            progress=progress,
        )
    return found


def token_counts(subject: Opened, pictures: Sequence[Picture]) -> tuple[float, float]:
    """Visual and language tokens of an example, means over at most one batch: what the null depends on."""
    some = pictures[: subject.batch]
    inputs = subject.prepare(some, [picture.captions[0] for picture in some])
    counts = (inputs.vision & inputs.tokens).sum(dim=1), inputs.language.sum(dim=1)
    return tuple(count.double().mean().item() for count in counts)


def table(probed: dict[str, Probed], counts: dict[str, tuple[float, float]], *, seed: int = 0) -> pd.DataFrame:
    """One row for each model: its tokens, and at the last layer flow from the input, its null, excess and NMI.

    Means with bootstrap 95% bounds, as `flow`, `flow_low`, `flow_high` and so on.
    """
    rows = []
    for name, result in probed.items():
        spans = result.means(seed=seed).set_index(["quantity", "start", "stop"])
        layers, features = result.flow.shape[1], result.nmi.shape[1] - 1
        row: dict[str, Any] = {
            "model": name,
            "layers": layers,
            "visual_tokens": counts[name][0],
            "words": counts[name][1],
        }
        for quantity, span in (("flow", (1, layers)), ("null", (1, layers)), ("excess", (1, layers)),
                               ("nmi", (features, features))):  # fmt: skip
            found = spans.loc[(quantity, *span)]
            row |= {quantity: found["mean"], f"{quantity}_low": found["low"], f"{quantity}_high": found["high"]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def means(probed: dict[str, Probed], *, seed: int = 0) -> pd.DataFrame:
    """`Probed.means` of every model in one table, column `model` first."""
    return pd.concat({name: result.means(seed=seed) for name, result in probed.items()}, names=["model"]).reset_index(
        level="model"
    )


def _batches(subject: Opened, parts: Sequence[Sequence[Picture]]) -> Iterator[Any]:
    for part in parts:
        yield subject.prepare(part, [picture.captions[0] for picture in part])


def _is_transformers(source: str) -> bool:
    file = Path(source).expanduser() / "config.json"
    if not source or not file.exists():
        return False
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and "model_type" in content


def _of_transformers(source: str) -> Opened:
    place = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        if config.model_type in NEEDS_REGIONS:
            raise CheckpointError(
                f"{source}: {config.model_type} takes region features, not images; make its inputs yourself and call "
                "probe_dataset"
            )
        processor = transformers.AutoProcessor.from_pretrained(place)
        model = kind.from_pretrained(place, dtype="auto").eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: {str(error).splitlines()[0][:200]}") from None
    is_decoder = bool(getattr(processor, "chat_template", None))  # large, and of many tokens: one pair at a time
    return Opened(Path(source).name, model, _Processed(model, processor), 1 if is_decoder else LARGEST_BATCH)


class _Processed:
    """Pictures and texts through a model's own processor."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(self, pictures: Sequence[Picture], texts: list[str]) -> Prepared:
        images = [Image.fromarray(picture.image.pixels()) for picture in pictures]
        made = self.processor(images=images, text=[self._prompt(text) for text in texts], padding=True,
                              return_tensors="pt")  # fmt: skip
        device = next(self.model.parameters()).device
        forward = {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}
        masks = modality_masks(self.model, forward)
        return Prepared(forward, masks.vision, masks.tokens, masks.tokens & ~masks.vision)

    def _prompt(self, text: str) -> str:
        """The text as the model was trained to meet an image: by its chat template, or behind its image token."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        token = getattr(self.processor, "image_token", "")
        return f"{token} {text}" if token and self.model.config.model_type != "paligemma" else text
