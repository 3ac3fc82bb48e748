"""Write a data set of generated scenes in the formats of the real data sets.

So one set of readers serves both: Karpathy's list of captions, VQA v2, NLVR2 and SNLI-VE. Image `i` of
a split depends on (seed, split, i) alone: a larger set begins with the smaller one, and the number of
processes changes nothing.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from vpworkbench.scenes.captions import captions
from vpworkbench.scenes.drawing import render
from vpworkbench.scenes.hypotheses import hypotheses
from vpworkbench.scenes.layout import scene_of, scene_rng
from vpworkbench.scenes.questions import questions, ten_answers
from vpworkbench.scenes.scene import SPLITS, Scene
from vpworkbench.scenes.statements import pair_statements
from vpworkbench.settings.scenes import SceneSettings


def write_scenes(folder: Path, settings: SceneSettings, *, processes: int | None = None, progress: bool = True) -> Path:
    """Write a data set of scenes, complete or not at all.

    Parameters
    ----------
    folder : Path
        Created. If it holds these very settings already, nothing is done.
    settings : SceneSettings
    processes : int, optional
        Default: the number of usable cores. The files do not depend on it.
    progress : bool
        Show a progress bar once the work has taken two seconds.

    Returns
    -------
    Path
        `folder`, with `images.zip`, `object_maps.zip`, `dataset_scenes.json` (Karpathy), the
        questions and annotations of VQA v2, `nlvr2/`, `snli_ve_*.jsonl` and `settings.json`.

    Raises
    ------
    FileExistsError
        If `folder` holds something else.
    OSError
        If it cannot be written, for example on a full disk; nothing is left behind.
    """
    folder = Path(folder)
    if _is_written(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_all(draft, settings, processes, progress)
        draft.chmod(0o755)  # mkdtemp made it private
        _publish(draft, folder, settings)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            error.errno,
            f"could not write the scenes to {folder}: {error.strerror or error}; "
            "the unfinished files were removed. Free some space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_written(folder: Path, settings: SceneSettings) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{folder} exists and holds no generated scenes; choose another folder") from None
    wanted = settings.model_dump()
    if found == wanted:
        return True
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    changes = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked" for key in differing)
    raise FileExistsError(
        f"{folder} holds scenes of other settings ({changes}); "
        "choose another folder, or delete this one to have it written anew"
    )


def _publish(draft: Path, folder: Path, settings: SceneSettings) -> None:
    """Files to disk first, the name last: a folder that exists is complete."""
    paths = [*draft.rglob("*"), draft]
    for path in paths:
        if os.name == "posix" or path.is_file():  # Windows cannot open folders
            handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    try:
        draft.rename(folder)
    except OSError:
        if not _is_written(folder, settings):  # else another process was faster, with equal files
            raise


class _Part(NamedTuple):
    """The texts and bytes of some neighbouring images of one split, ready to be written."""

    split: str
    pictures: list[tuple[str, bytes]]  # file name, PNG
    object_maps: list[tuple[str, bytes]]
    pair_pictures: list[tuple[str, bytes]]
    entries: list[str]  # JSON, as are all below
    questions: list[str]
    annotations: list[str]
    statements: list[str]
    hypotheses: list[str]


GROUP = 4  # images that share two statements, as two pairs
PART = 16 * GROUP


def _write_all(draft: Path, settings: SceneSettings, processes: int | None, progress: bool) -> None:
    counts = {"train": settings.images, "val": settings.val, "test": settings.test}
    tasks = [
        (settings, split, start, min(start + PART, count))
        for split, count in counts.items()
        for start in range(0, count, PART)
    ]
    bar = tqdm(total=sum(counts.values()), unit=" images", delay=2, disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(bar)
        files = stack.enter_context(_Files(draft, [split for split in counts if counts[split]]))
        for part in _parts(tasks, processes or _usable_cores(), stack):
            files.write(part)
            bar.update(len(part.pictures))
    (draft / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parts(tasks: list[tuple], processes: int, stack: ExitStack) -> Iterator[_Part]:
    """Parts in order; a few are made ahead, never all, so that memory stays small."""
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from map(_make_part, tasks)
        return
    pool = ProcessPoolExecutor(processes, initializer=_serve_parent)
    stack.callback(pool.shutdown, cancel_futures=True)
    waiting = iter(tasks)
    ahead = [pool.submit(_make_part, task) for task in islice(waiting, 3 * processes)]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(_make_part, task) for task in islice(waiting, 1)]


def _serve_parent() -> None:
    """Leave it to the parent to stop the workers; where it is killed, end, as nobody else would end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_part(task: tuple[SceneSettings, str, int, int]) -> _Part:
    settings, split, start, stop = task
    part = _Part(split, *([] for _ in _Part._fields[1:]))
    scenes = [scene_of(settings, split, index) for index in range(start, stop)]
    for index, scene in enumerate(scenes, start):
        image, object_map = render(scene, scene_rng(settings, split, index, stream=1))
        name = f"{split}-{index:06d}.png"
        part.pictures.append((name, _png(image)))
        part.object_maps.append((name, _png(object_map)))
        _add_texts(part, scene, index, scene_rng(settings, split, index, stream=2))
    for first in range(0, len(scenes) - GROUP + 1, GROUP):
        rng = scene_rng(settings, split, start + first, stream=3)
        _add_pairs(part, scenes[first : first + GROUP], first, start + first, rng)
    return part


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _image_id(split: str, index: int) -> int:
    return SPLITS.index(split) * 10_000_000 + index


def _add_texts(part: _Part, scene: Scene, index: int, rng: np.random.Generator) -> None:
    """Captions, questions and hypotheses of one image."""
    name, number = f"{part.split}-{index:06d}", _image_id(part.split, index)
    told = captions(scene, rng)
    sentences = [
        {"raw": text, "tokens": text.split(), "imgid": number, "sentid": number * 5 + k} for k, text in enumerate(told)
    ]
    entry = {
        "filename": f"{name}.png", "imgid": number, "split": part.split,
        "sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences,
    } | scene.to_json()  # fmt: skip
    part.entries.append(json.dumps(entry))
    for k, question in enumerate(questions(scene, rng)):
        ids = {"image_id": number, "question_id": number * 1000 + k}
        part.questions.append(json.dumps(ids | {"question": question.text}))
        annotation = ids | {
            "question_type": question.kind, "answer_type": question.answer_type,
            "multiple_choice_answer": question.answer,
            "answers": ten_answers(question, rng),
        }  # fmt: skip
        part.annotations.append(json.dumps(annotation))
    for k, (text, label) in enumerate(hypotheses(scene, told[0], rng)):
        line = {
            "Flickr30K_ID": name, "sentence1": told[0], "sentence2": text,
            "gold_label": label, "annotator_labels": [label],
            "captionID": f"{name}.png#0", "pairID": f"{name}.png#0r{k}{label[0]}",
        }  # fmt: skip
        part.hypotheses.append(json.dumps(line))


NLVR2_SPLITS = {"train": "train", "val": "dev", "test": "test1"}


def _add_pairs(part: _Part, scenes: Sequence[Scene], first: int, index: int, rng: np.random.Generator) -> None:
    """Two statements on two pairs of images; each is true of one pair and false of the other."""
    pairs = ((scenes[0], scenes[1]), (scenes[2], scenes[3]))
    statements = pair_statements(*pairs, rng)
    split, group = NLVR2_SPLITS[part.split], index // GROUP
    for pair in (0, 1) if statements else ():
        sources = part.pictures[first + 2 * pair : first + 2 * pair + 2]
        for side, (_, png) in enumerate(sources):
            part.pair_pictures.append((f"{split}-{group}-{pair}-img{side}.png", png))
        for k, sentence in enumerate(statements):
            line = {
                "sentence": sentence, "label": str(k == pair), "synset": "scene",
                "identifier": f"{split}-{group}-{pair}-{k}",
                "left_url": sources[0][0], "right_url": sources[1][0],
            }  # fmt: skip
            part.statements.append(json.dumps(line))


def pair_sources(folder: Path) -> dict[str, str]:
    """Of each image of `nlvr2/images.zip` the one of `images.zip` that it is a copy of, by name."""
    found = {}
    for file in sorted((folder / "nlvr2").glob("*.json")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            pair = line["identifier"].rpartition("-")[0]
            for side, source in enumerate((line["left_url"], line["right_url"])):
                found[f"images/{pair}-img{side}.png"] = f"images/{source}"
    return found


class _Files:
    """The open files of a data set; parts are added in order."""

    def __init__(self, folder: Path, splits: Sequence[str]) -> None:
        self.stack = ExitStack()
        (folder / "nlvr2").mkdir()
        try:
            self.pictures = self._zip(folder / "images.zip")
            self.object_maps = self._zip(folder / "object_maps.zip")
            self.pair_pictures = self._zip(folder / "nlvr2" / "images.zip")
            info = {"dataset": "scenes"}
            self.entries = self._list(folder / "dataset_scenes.json", "images", info)
            self.questions, self.annotations, self.statements, self.hypotheses = {}, {}, {}, {}
            for split in splits:
                info = _vqa_header(split)
                name = f"v2_OpenEnded_scenes_{split}_questions.json"
                self.questions[split] = self._list(folder / name, "questions", info)
                name = f"v2_scenes_{split}_annotations.json"
                self.annotations[split] = self._list(folder / name, "annotations", info)
                published = NLVR2_SPLITS[split]
                self.statements[split] = self._open(folder / "nlvr2" / f"{published}.json")
                published = {"val": "dev"}.get(split, split)
                self.hypotheses[split] = self._open(folder / f"snli_ve_{published}.jsonl")
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def write(self, part: _Part) -> None:
        """Append a part to every file."""
        for name, png in part.pictures:
            _store(self.pictures, f"images/{name}", png)
        for name, png in part.object_maps:
            _store(self.object_maps, f"object_maps/{name}", png)
        for name, png in part.pair_pictures:
            _store(self.pair_pictures, f"images/{name}", png)
        self.entries.add(part.entries)
        self.questions[part.split].add(part.questions)
        self.annotations[part.split].add(part.annotations)
        self.statements[part.split].writelines(line + "\n" for line in part.statements)
        self.hypotheses[part.split].writelines(line + "\n" for line in part.hypotheses)

    def _open(self, path: Path) -> Any:
        return self.stack.enter_context(path.open("w", encoding="utf-8"))

    def _zip(self, path: Path) -> zipfile.ZipFile:
        return self.stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED))

    def _list(self, path: Path, key: str, header: dict[str, Any]) -> _JsonList:
        return self.stack.enter_context(_JsonList(self._open(path), key, header))


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's date is fixed: equal files


def _vqa_header(split: str) -> dict[str, Any]:
    return {
        "info": {"description": "Generated scenes in the format of VQA v2", "version": "2.0"},
        "license": {"name": "generated"},
        "data_type": "scenes",
        "data_subtype": split,
        "task_type": "Open-Ended",
    }


class _JsonList:
    """A JSON object whose last key is a long list, written as it comes."""

    def __init__(self, file: Any, key: str, header: dict[str, Any]) -> None:
        self.file, self.separator = file, ""
        file.write(json.dumps(header)[:-1] + f', "{key}": [\n')

    def add(self, items: Sequence[str]) -> None:
        """Append items that are JSON already."""
        for item in items:
            self.file.write(self.separator + item)
            self.separator = ",\n"

    def __enter__(self) -> _JsonList:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.write("\n]}\n")
