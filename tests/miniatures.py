"""Hand-made miniatures of the published formats, two or three records each, of which one can be changed.

A change is merged into the second record; the value `...` takes its key away.
"""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

Change = dict[str, Any] | None


def picture(path: Path, colour: tuple[int, int, int] = (1, 2, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def resized(source: Path, target: Path) -> Path:
    """The same photograph in other bytes, as collections keep it in other sizes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.resize((9, 6)).save(target, format="jpeg", quality=90)
    return target


def zipped(archive: Path, *paths: Path, under: str = "") -> Path:
    """Move files into a new zip."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as writer:
        for path in paths:
            writer.write(path, f"{under}{path.name}")
            path.unlink()
    return archive


def changed(record: dict[str, Any], change: Change) -> dict[str, Any]:
    return {key: value for key, value in (record | (change or {})).items() if value is not ...}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def karpathy(folder: Path, record: Change = None) -> Path:
    """As dataset_flickr30k.json: three photographs, train, val and restval."""
    images = []
    for number, split in enumerate(("train", "val", "restval")):
        picture(folder / "images" / f"10{number}.jpg", (90 * number, 0, 0))
        raw = f"A dog  runs {number} ."
        sentence = {"raw": raw, "tokens": raw.lower().split(), "imgid": number, "sentid": number}
        images.append(
            {
                "filename": f"10{number}.jpg",
                "imgid": number,
                "split": split,
                "sentids": [number],
                "sentences": [sentence],
            }
        )
    images[1] = changed(images[1], record)
    return written(folder / "dataset_mine.json", {"images": images, "dataset": "flickr30k"})


def coco(folder: Path, *, image: Change = None, caption: Change = None, subset: str = "train2014") -> Path:
    """As annotations/captions_train2014.json, its images in train2014/ beside `annotations`."""
    images, captions = [], []
    for number in (9, 25):
        name = f"COCO_{subset}_{number:012d}.jpg" if subset.endswith("2014") else f"{number:012d}.jpg"
        picture(folder / subset / name, (number, 80, 0))
        images.append(
            {
                "license": 5,
                "file_name": name,
                "coco_url": f"http://mscoco.org/images/{number}",
                "height": 4,
                "width": 6,
                "date_captured": "2013-11-14 16:28:13",
                "id": number,
                "flickr_url": f"http://farm4.staticflickr.com/3153/70{number}_164f0c0b83_z.jpg",
            }
        )
        captions += [
            {"image_id": number, "id": 10 * number + k, "caption": f"A very clean  bathroom {number} {k}.\n"}
            for k in (0, 1)
        ]
    images[1], captions[1] = changed(images[1], image), changed(captions[1], caption)
    content = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": captions}
    return written(folder / "annotations" / f"captions_{subset}.json", content)


def visual_genome(folder: Path, *, image: Change = None, region: Change = None, data: Change = None) -> Path:
    """As region_descriptions.json and image_data.json, with images in VG_100K/ and VG_100K_2/."""
    images, known = [], []
    for number, place in ((1, "VG_100K_2"), (2, "VG_100K")):
        picture(folder / place / f"{number}.jpg", (number, 0, 70))
        regions = [
            {
                "region_id": 1380 + 10 * number + k,
                "width": 82,
                "height": 139,
                "image_id": number,
                "x": 421,
                "y": 57,
                "phrase": phrase,
            }
            for k, phrase in enumerate((f"the clock  is {number}", "a man", "a man"))
        ]
        images.append({"regions": regions, "id": number})
        url = f"https://cs.stanford.edu/people/rak248/{place}/{number}.jpg"
        known.append({"width": 6, "url": url, "height": 4, "image_id": number, "coco_id": None, "flickr_id": None})
    images[1] = changed(images[1], image)
    if region is not None:
        images[1]["regions"][0] = changed(images[1]["regions"][0], region)
    known[1] = changed(known[1], data)
    written(folder / "image_data.json", known)
    return written(folder / "region_descriptions.json", images)


NLVR1 = {
    "sentence": "There is a black  circle",
    "label": "true",
    "identifier": "7-0",
    "directory": "2",
    "evals": {"r0": "true"},
    "structured_rep": [[{"y_loc": 10, "type": "circle", "color": "Black", "x_loc": 10, "size": 20}], [], []],
}


def nlvr1(folder: Path, record: Change = None) -> Path:
    """As dev.json, images in images/<directory>/."""
    for number in range(2):
        for order in range(6):
            picture(folder / "images" / "2" / f"dev-7-{number}-{order}.png", (number, order, 0))
    return lines(folder / "dev.json", NLVR1, changed(NLVR1 | {"identifier": "7-1", "label": "false"}, record))


def vqa(folder: Path, *, question: Change = None, answer: Change = None, subset: str = "val2014") -> Path:
    """As v2_OpenEnded_mscoco_val2014_questions.json and its annotations: two questions of one COCO image."""
    images = subset.replace("-dev", "")
    picture(folder / images / f"COCO_{images}_000000262148.jpg", (33, 44, 55))
    first = {"image_id": 262148, "question": "Where is he  looking?", "question_id": 262148000}
    second = {"image_id": 262148, "question": "Is he on a board?", "question_id": 262148001}
    ten = [{"answer": "down", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    one = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}]
    told = [
        {
            "question_type": "where is",
            "multiple_choice_answer": "down",
            "answers": ten,
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        },
        {
            "question_type": "is he",
            "multiple_choice_answer": "yes",
            "answers": one,
            "image_id": 262148,
            "answer_type": "yes/no",
            "question_id": 262148001,
        },
    ]
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    told[1] = changed(told[1], answer)
    written(folder / f"v2_mscoco_{subset}_annotations.json", header | {"annotations": told})
    asked = header | {"task_type": "Open-Ended", "questions": [first, changed(second, question)]}
    return written(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", asked)


NLVR2 = {
    "validation": {"7": "True"},
    "sentence": "The left image  has two dogs.",
    "left_url": "http://a/b.jpg",
    "writer": 3,
    "label": "True",
    "right_url": "http://a/c.jpg",
    "synset": "dog",
    "query": "dogs",
    "identifier": "dev-850-0-0",
    "extra_validations": {},
}


def nlvr2(folder: Path, record: Change = None) -> Path:
    """As dev.json, its images in a zip."""
    sides = [picture(folder / f"dev-850-0-img{side}.png", (side, 0, 9)) for side in (0, 1)]
    zipped(folder / "dev_img.zip", *sides, under="dev/")
    return lines(folder / "dev.json", NLVR2, changed(NLVR2 | {"identifier": "dev-850-0-1", "label": "False"}, record))


SNLI_VE = {
    "Flickr30K_ID": "3416050480",
    "annotator_labels": ["neutral", "entailment"],
    "captionID": "3416050480.jpg#4",
    "gold_label": "neutral",
    "pairID": "3416050480.jpg#4r1n",
    "sentence1": "A person on a horse.",
    "sentence2": "A person  is training his horse.",
}


def snli_ve(folder: Path, record: Change = None) -> Path:
    """As snli_ve_dev.jsonl over flickr30k-images/."""
    picture(folder / "flickr30k-images" / "3416050480.jpg", (9, 9, 9))
    return lines(folder / "snli_ve_dev.jsonl", SNLI_VE, changed(SNLI_VE | {"pairID": "b"}, record))


ROWS = [
    {"image": "photos/é 1.jpg", "text": "a red square", "label": "true", "split": "train"},
    {"image": "photos/é 1.jpg", "text": "a blue  one, really", "label": "false", "split": ""},
    {"image": "photos/2.jpg", "text": "a circle", "label": "true", "split": "val"},
]

QUESTIONS = [
    {"image": "photos/é 1.jpg", "text": "what colour?", "label": "red"},
    {"image": "photos/2.jpg", "text": "how many?", "label": "2"},
]
PAIRS = [
    {"image": "photos/é 1.jpg", "image2": "photos/2.jpg", "text": "both red", "label": "true", "id": "a"},
    {"image": "photos/2.jpg", "image2": "photos/3.jpg", "text": "one red", "label": "False", "id": "b"},
]
RELATIONS = [
    {"image": "photos/é 1.jpg", "text": "it is red", "label": "entailment", "split": "train"},
    {"image": "photos/2.jpg", "text": "it is blue", "label": "contradiction", "split": "val"},
]


def table(folder: Path, record: Change = None, *, kind: str = "csv", rows: list[dict[str, Any]] = ROWS) -> Path:
    """One's own csv or jsonl, images in photos/."""
    for number, name in enumerate(("é 1.jpg", "2.jpg", "3.jpg")):
        picture(folder / "photos" / name, (0, 0, 80 * number))
    rows = [rows[0], changed(rows[1], record), *rows[2:]]
    path = folder / f"mine.{kind}"
    if kind == "jsonl":
        return lines(path, *rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        header = [key for key in rows[0] if key in rows[1]]
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path
