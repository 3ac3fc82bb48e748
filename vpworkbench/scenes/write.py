"""Write a data set of generated scenes in the formats of published data sets, so that the same readers serve both.

Image `i` of a split depends only on (seed, split, i): a larger set begins with the smaller one, and the number of
processes changes nothing.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel
from tqdm.auto import tqdm

from vpworkbench.scenes.drawing import render
from vpworkbench.scenes.layout import scene_of, scene_rng
from vpworkbench.scenes.scene import SPLITS, Scene
from vpworkbench.scenes.statements import hypotheses, pair_statements
from vpworkbench.scenes.texts import PER_IMAGE, captions, questions, ten_answers
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.system import draft

IMAGES, OBJECT_MAPS, PAIR_IMAGES = "images.zip", "object_maps.zip", "nlvr2/images.zip"
ENTRIES = "dataset_scenes.json"
NLVR2_SPLITS = {"train": "train", "val": "dev", "test": "test1"}
SNLI_VE_SPLITS = {"train": "train", "val": "dev", "test": "test"}

GROUP = 4  # images that share two statements, as two pairs
PART = 16 * GROUP  # images that a process makes at a time


def write_scenes(folder: Path, settings: SceneSettings, *, processes: int | None = None) -> Path:
    """Write a data set of scenes, either complete or not at all, and return its folder.

    It then holds `images.zip`, `object_maps.zip`, `dataset_scenes.json` (Karpathy), the questions and annotations of
    VQA v2, `nlvr2/`, `snli_ve_*.jsonl` and `settings.json`. If it holds these very settings already, nothing is done.
    The files do not depend on the number of processes (default: one for each usable core). A progress bar appears after
    two seconds.

    A `FileExistsError` if `folder` holds something else; an `OSError` if the files cannot be written, for example on a
    full disk: nothing is left behind.
    """
    counts = {"train": settings.images, "val": settings.val, "test": settings.test}
    written = [split for split in counts if counts[split]]
    kind = SetKind(_make_part, (IMAGES, OBJECT_MAPS, PAIR_IMAGES), partial(_write_texts, written))
    tasks = [(settings, split, *span) for split in written for span in spans(counts[split])]
    return write_set(folder, settings, kind, tasks, processes)


class Part(NamedTuple):
    """Some neighbouring images of a set and their texts, by the file that they go to."""

    images: dict[str, list[tuple[str, bytes]]]  # zip -> names and PNGs
    texts: dict[str, list[str]]  # file -> records as JSON


class SetKind(NamedTuple):
    """How a kind of data set is made and written."""

    make_part: Callable[..., Part]  # from one task; its last two items are the first image, and the one after the last
    zips: tuple[str, ...]
    write_texts: Callable[[Path, dict[str, list[str]]], None]  # from the folder and `Part.texts` of all parts


def spans(images: int) -> list[tuple[int, int]]:
    """First image, and the one after the last, of each part of a set."""
    return [(start, min(start + PART, images)) for start in range(0, images, PART)]


def write_set(
    folder: Path, settings: BaseModel, kind: SetKind, tasks: Sequence[tuple], processes: int | None = None
) -> Path:
    """Write a data set part by part; see `write_scenes`."""
    if _is_written(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft(folder) as unfinished:
            unfinished.mkdir()
            _write_all(unfinished, settings, kind, tasks, processes)
    except OSError as error:
        if not _is_written(folder, settings):  # else another process was faster, with the same files
            raise OSError(
                error.errno,
                f"could not write the scenes to {folder}: {error.strerror or error}; "
                "the unfinished files were removed. Free some space or choose another folder",
            ) from error
    return folder


def pair_sources(folder: Path) -> dict[str, str]:
    """For each image in `nlvr2/images.zip`, by name, the image in `images.zip` that it is a copy of."""
    found = {}
    for file in sorted((folder / "nlvr2").glob("*.json")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            pair = line["identifier"].rpartition("-")[0]
            for side, source in enumerate((line["left_url"], line["right_url"])):
                found[f"images/{pair}-img{side}.png"] = f"images/{source}"
    return found


def _is_written(folder: Path, settings: BaseModel) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{folder} exists and holds no generated scenes; choose another folder") from None
    wanted = settings.model_dump()
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if not differing:
        return True
    changes = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} requested" for key in differing)
    raise FileExistsError(
        f"{folder} holds scenes of other settings ({changes}); choose another folder, or delete this one to rewrite it"
    )


def _text_files(split: str) -> dict[str, str]:
    """The text files of a split, named as in the published data sets."""
    return {
        "questions": f"v2_OpenEnded_scenes_{split}_questions.json",
        "annotations": f"v2_scenes_{split}_annotations.json",
        "statements": f"nlvr2/{NLVR2_SPLITS[split]}.json",
        "hypotheses": f"snli_ve_{SNLI_VE_SPLITS[split]}.jsonl",
    }


def _make_part(settings: SceneSettings, split: str, start: int, stop: int) -> Part:
    part = Part(defaultdict(list), defaultdict(list))
    scenes = [scene_of(settings, split, index) for index in range(start, stop)]
    for index, scene in enumerate(scenes, start):
        add_image(part, f"{split}-{index:06d}.png", scene, scene_rng(settings, split, index, stream=1))
        _add_texts(part, scene, split, index, scene_rng(settings, split, index, stream=2))
    for first in range(0, len(scenes) - GROUP + 1, GROUP):
        statements = pair_statements(
            (scenes[first], scenes[first + 1]),
            (scenes[first + 2], scenes[first + 3]),
            scene_rng(settings, split, start + first, stream=3),
        )
        if statements:
            _add_statements(part, statements, split, start + first, part.images[IMAGES][first : first + GROUP])
    return part


def add_image(part: Part, name: str, scene: Scene, rng: np.random.Generator) -> None:
    """Draw a scene; add its picture and its object map."""
    image, object_map = render(scene, rng)
    part.images[IMAGES].append((f"images/{name}", _png(image)))
    part.images[OBJECT_MAPS].append((f"object_maps/{name}", _png(object_map)))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _add_texts(part: Part, scene: Scene, split: str, index: int, rng: np.random.Generator) -> None:
    """Captions, questions and hypotheses of one image."""
    files = _text_files(split)
    name, number = f"{split}-{index:06d}", SPLITS.index(split) * 10_000_000 + index
    texts = captions(scene, rng)
    sentences = [
        {"raw": text, "tokens": text.split(), "imgid": number, "sentid": number * PER_IMAGE + k}
        for k, text in enumerate(texts)
    ]
    entry = {"filename": f"{name}.png", "imgid": number, "split": split}
    entry |= {"sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences}
    part.texts[ENTRIES].append(json.dumps(entry | scene.to_json()))
    for k, question in enumerate(questions(scene, rng)):
        ids = {"image_id": number, "question_id": number * 1000 + k}
        kinds = {"question_type": question.kind, "answer_type": question.answer_type}
        answers = {"multiple_choice_answer": question.answer, "answers": ten_answers(question, rng)}
        part.texts[files["questions"]].append(json.dumps(ids | {"question": question.text}))
        part.texts[files["annotations"]].append(json.dumps(ids | kinds | answers))
    for k, (text, label) in enumerate(hypotheses(scene, texts[0], rng)):
        line = {"Flickr30K_ID": name, "sentence1": texts[0], "sentence2": text}
        line |= {"gold_label": label, "annotator_labels": [label]}
        line |= {"captionID": f"{name}.png#0", "pairID": f"{name}.png#0r{k}{label[0]}"}
        part.texts[files["hypotheses"]].append(json.dumps(line))


def _add_statements(
    part: Part, statements: Sequence[str], split: str, index: int, images: Sequence[tuple[str, bytes]]
) -> None:
    """Two statements on the two pairs of four images, the first of which has this index.

    Statement 0 is true of pair 0 and false of pair 1, statement 1 the other way round.
    """
    for pair in (0, 1):
        name = f"{NLVR2_SPLITS[split]}-{index // GROUP}-{pair}"
        sides = images[2 * pair : 2 * pair + 2]
        part.images[PAIR_IMAGES] += [(f"images/{name}-img{side}.png", png) for side, (_, png) in enumerate(sides)]
        left, right = (source.removeprefix("images/") for source, _ in sides)
        for k, sentence in enumerate(statements):
            line = {"sentence": sentence, "label": str(k == pair), "synset": "scene"}
            line |= {"identifier": f"{name}-{k}", "left_url": left, "right_url": right}
            part.texts[_text_files(split)["statements"]].append(json.dumps(line))


def _parts(make: Callable[..., Part], tasks: Sequence[tuple], processes: int) -> Iterator[Part]:
    """Parts in order; a few are made ahead, never all, so that memory stays small."""
    if processes == 1:
        yield from (make(*task) for task in tasks)
        return
    with ProcessPoolExecutor(processes, initializer=_end_with_parent) as pool:
        waiting = iter(tasks)
        ahead = deque(pool.submit(make, *task) for task in islice(waiting, 3 * processes))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(make, *task) for task in islice(waiting, 1))


def _end_with_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_all(folder: Path, settings: BaseModel, kind: SetKind, tasks: Sequence[tuple], processes: int | None) -> None:
    """Images as they are made; the texts, which are small, at the end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    texts: dict[str, list[str]] = defaultdict(list)
    with ExitStack() as stack:
        archives = {}
        for name in kind.zips:
            (folder / name).parent.mkdir(exist_ok=True)
            archives[name] = stack.enter_context(zipfile.ZipFile(folder / name, "w", zipfile.ZIP_STORED))
        bar = stack.enter_context(tqdm(total=sum(stop - start for *_, start, stop in tasks), unit=" images", delay=2))
        parts = _parts(kind.make_part, tasks, min(processes or cores, len(tasks)))
        for part in stack.enter_context(closing(parts)):
            for name, images in part.images.items():
                for image, png in images:
                    archives[name].writestr(zipfile.ZipInfo(image), png)  # ZipInfo's date is fixed: equal files
            for name, records in part.texts.items():
                texts[name] += records
            bar.update(len(part.images[IMAGES]))
    kind.write_texts(folder, texts)
    (folder / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n")


def _write_texts(splits: Sequence[str], folder: Path, texts: dict[str, list[str]]) -> None:
    write_list(folder / ENTRIES, "images", {"dataset": "scenes"}, texts[ENTRIES])
    for split in splits:
        header = {
            "info": {"description": "Generated scenes in the format of VQA v2", "version": "2.0"},
            "license": {"name": "generated"},
            "data_type": "scenes",
            "data_subtype": split,
            "task_type": "Open-Ended",
        }
        for key, name in _text_files(split).items():
            if key in ("questions", "annotations"):
                write_list(folder / name, key, header, texts[name])
            else:
                (folder / name).write_text("".join(f"{record}\n" for record in texts[name]), encoding="utf-8")


def write_list(path: Path, key: str, header: dict[str, Any], records: Sequence[str]) -> None:
    """One JSON object whose last value is a list of records, which are JSON already."""
    text = ",\n".join(records)
    path.write_text(f'{json.dumps(header)[:-1]}, "{key}": [\n{text}\n]}}\n', encoding="utf-8")
