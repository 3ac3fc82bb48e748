"""Whatever is wrong with a record, its reader names the file and the record; all of it at once where faults collect."""

from __future__ import annotations

from functools import partial

import pytest
from miniatures import (
    PAIRS,
    QUESTIONS,
    RELATIONS,
    SNLI_VE,
    coco,
    karpathy,
    nlvr1,
    nlvr2,
    snli_ve,
    table,
    visual_genome,
    vqa,
)

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import collected_findings
from vpworkbench.data.task_readers import NLVR1_TASK, NLVR2, read_snli_ve, read_vqa
from vpworkbench.errors import DataError


def all_of(read, path):
    return [record for records in read(path).values() for record in records]


READERS = {
    "karpathy": (karpathy, read_pictures),
    "coco": (coco, read_pictures),
    "vg": (visual_genome, read_pictures),
    "nlvr1": (nlvr1, partial(all_of, NLVR1_TASK.read)),
    "vqa": (vqa, partial(all_of, read_vqa)),
    "nlvr2": (nlvr2, partial(all_of, NLVR2.read)),
    "snli-ve": (snli_ve, partial(all_of, read_snli_ve)),
    "csv": (table, read_pictures),
    "jsonl": (partial(table, kind="jsonl"), read_pictures),
    "csv of questions": (partial(table, rows=QUESTIONS), partial(all_of, read_vqa)),
    "jsonl of pairs": (partial(table, rows=PAIRS, kind="jsonl"), partial(all_of, NLVR2.read)),
    "csv of pairs": (partial(table, rows=PAIRS), partial(all_of, NLVR2.read)),
    "csv of relations": (partial(table, rows=RELATIONS), partial(all_of, read_snli_ve)),
}
HALF = "a \ud83d cat"  # half an emoji, as UTF-16 has it
IMAGE_GONE, LEAVES = "gone.* missing in .*restore it or drop the record", "leaves the image folder"
CASES = [
    ("karpathy", {"record": {"sentences": [{"raw": 7}]}}, r"images\[1\]: sentences.0.raw: .*string"),
    ("karpathy", {"record": {"sentences": [{"text": "x"}]}}, r"images\[1\]: sentences.0.raw: Field required"),
    ("karpathy", {"record": {"sentences": [{"raw": "  "}]}}, r"images\[1\]: sentences.0.raw"),
    ("karpathy", {"record": {"sentences": []}}, r"images\[1\]: sentences"),
    ("karpathy", {"record": {"sentences": [{"raw": HALF}]}}, r"images\[1\]: sentences.0.raw: .*unicode"),
    ("karpathy", {"record": {"things": [{"box": [0, 0, 1, 1]}]}}, r"images\[1\] .101.jpg.: things: .*correct them"),
    ("karpathy", {"record": {"things": [{}]}}, r"images\[1\] .101.jpg.: things: .*box"),
    ("karpathy", {"record": {"split": "training"}}, r"images\[1\]: split"),
    ("karpathy", {"record": {"cocoid": "x"}}, r"images\[1\]: cocoid"),
    ("karpathy", {"record": {"filename": "100.jpg"}}, r"images\[1\] \(100.jpg\): a second record of this id"),
    ("karpathy", {"record": {"filename": "gone.jpg"}}, rf"images\[1\] \(gone.jpg\): image {IMAGE_GONE}"),
    ("karpathy", {"record": {"filename": "../101.jpg"}}, rf"images\[1\] .*{LEAVES}"),
    ("coco", {"image": {"id": "x"}}, r"images\[1\]: id: "),
    ("coco", {"image": {"id": "-25"}}, r"images\[1\]: id: .*integer"),
    ("coco", {"image": {"file_name": ...}}, r"images\[1\]: file_name: Field required"),
    ("coco", {"image": {"id": 9}}, r"images\[1\] \(9\): a second record of this id"),
    ("coco", {"image": {"file_name": "gone.jpg"}}, rf"images\[1\] \(25\): image .*{IMAGE_GONE}"),
    ("coco", {"image": {"file_name": "/etc/../a.jpg"}}, rf"images\[1\] .*{LEAVES}"),
    ("coco", {"image": {"file_name": "/etc/a.jpg"}}, r"images\[1\] \(25\): image .*/etc/a.jpg missing"),
    ("coco", {"caption": {"caption": None}}, r"annotations\[1\]: caption: .*string"),
    ("coco", {"caption": {"caption": HALF}}, r"annotations\[1\]: caption: .*unicode"),
    ("vg", {"region": {"phrase": HALF}}, r"\[1\]: regions.0.phrase: .*unicode"),
    ("vqa", {"answer": {"answers": [{"answer": HALF}]}}, r"annotations\[1\]: answers.0.answer: .*unicode"),
    ("snli-ve", {"record": {"pairID": HALF}}, "line 2: pairID: .*unicode"),
    ("jsonl", {"record": {"id": HALF}}, "line 2: id.*unicode"),
    ("coco", {"caption": {"image_id": ...}}, r"annotations\[1\]: image_id: Field required"),
    ("coco", {"caption": {"image_id": 25.0}}, r"annotations\[1\]: image_id: .*integer"),
    ("coco", {"caption": {"id": 90}}, r"annotations\[1\] \(90\): a second record of this id"),
    ("coco", {"caption": {"image_id": 8}}, r"annotations\[1\] \(91\): image_id 8 is none of the images"),
    ("vg", {"image": {"id": "x"}}, r"\[1\]: id: "),
    ("vg", {"image": {"id": ...}}, r"\[1\]: id: Field required"),
    ("vg", {"image": {"id": "2.0"}}, r"\[1\]: id: .*integer"),
    (
        "vg",
        {"image": {"id": 1, "regions": [{"region_id": 3, "phrase": "x"}]}},
        r"\[1\] \(1\): a second record of this id",
    ),
    ("vg", {"image": {"id": 7, "regions": []}}, r"\[1\] \(7\): image .*7.jpg missing"),
    ("vg", {"region": {"phrase": 3}}, r"\[1\]: regions.0.phrase: .*string"),
    ("vg", {"region": {"phrase": ...}}, r"\[1\]: regions.0.phrase: Field required"),
    ("vg", {"data": {"coco_id": "x"}}, r"image_data.json: \[1\]: coco_id: .*integer"),
    ("vg", {"data": {"flickr_id": True}}, r"image_data.json: \[1\]: flickr_id: .*integer"),
    ("vg", {"data": {"image_id": 1}}, r"image_data.json: \[1\] \(1\): a second record of this id"),
    ("nlvr1", {"record": {"label": "maybe"}}, "line 2: label"),
    ("nlvr1", {"record": {"identifier": 3}}, "line 2: identifier"),
    ("nlvr1", {"record": {"sentence": ...}}, "line 2: sentence: Field required"),
    ("nlvr1", {"record": {"sentence": " "}}, "line 2: sentence"),
    ("nlvr1", {"record": {"structured_rep": [[{"type": "cone"}], [], []]}}, r"line 2: structured_rep.0.0.type"),
    ("nlvr1", {"record": {"identifier": "7-0"}}, r"line 2 \(7-0\): a second record of this id"),
    ("nlvr1", {"record": {"identifier": "gone"}}, rf"line 2 \(gone\): image .*{IMAGE_GONE}"),
    ("nlvr1", {"record": {"directory": "../.."}}, rf"line 2 .*{LEAVES}"),
    ("vqa", {"question": {"question": ""}}, r"questions\[1\]: question"),
    ("vqa", {"question": {"question": "  "}}, r"questions\[1\]: question"),
    ("vqa", {"question": {"question_id": True}}, r"questions\[1\]: question_id: .*integer"),
    ("vqa", {"question": {"question_id": "262148001a"}}, r"questions\[1\]: question_id: .*integer"),
    ("vqa", {"answer": {"image_id": 262148.0}}, r"annotations\[1\]: image_id: .*integer"),
    ("vqa", {"question": {"question": ...}}, r"questions\[1\]: question: Field required"),
    ("vqa", {"question": {"image_id": "x"}}, r"questions\[1\]: image_id"),
    ("vqa", {"question": {"image_id": 7}}, r"questions\[1\] \(262148001\): image_id 7, but 262148 in"),
    ("vqa", {"question": {"image_id": 7}, "answer": {"image_id": 7}}, r"262148001\): image COCO_val.*07.jpg .*missing"),
    ("vqa", {"question": {"question_id": 5}}, r"questions\[1\] \(5\): no annotation of it"),
    ("vqa", {"question": {"question_id": 262148000}}, r"questions\[1\] \(262148000\): a second record of this id"),
    ("vqa", {"answer": {"question_id": 262148000}}, r"annotations\[1\] \(262148000\): a second record of this id"),
    ("vqa", {"answer": {"answers": []}}, r"annotations\[1\]: answers"),
    ("vqa", {"answer": {"answers": [{"answer": " "}]}}, r"annotations\[1\]: answers"),
    ("vqa", {"answer": {"answers": [{"text": "no"}]}}, r"annotations\[1\]: answers.0.answer: Field required"),
    ("nlvr2", {"record": {"label": "maybe"}}, "line 2: label"),
    ("nlvr2", {"record": {"sentence": 7}}, "line 2: sentence: .*string"),
    ("nlvr2", {"record": {"label": None}}, r"line 2 \(dev-850-0-1\): no label; only test may lack it"),
    ("nlvr2", {"record": {"label": ...}}, r"line 2 \(dev-850-0-1\): no label; only test may lack it"),
    ("nlvr2", {"record": {"sentence": " \n"}}, "line 2: sentence"),
    ("nlvr2", {"record": {"identifier": "850-0-0"}}, r"line 2 \(850-0-0\): identifier: not split-set-pair-sentence"),
    ("nlvr2", {"record": {"sentence": ...}}, "line 2: sentence: Field required"),
    ("nlvr2", {"record": {"identifier": "dev-850-0-0"}}, "line 2 .*dev-850-0-0.*: a second record of this id"),
    (
        "nlvr2",
        {"record": {"identifier": "gone-850-0-0"}},
        r"line 2 \(gone-850-0-0\): image gone-850-0-img0.png missing",
    ),
    ("nlvr2", {"record": {"identifier": "../../x-8-0-0"}}, rf"line 2 .*{LEAVES}"),
    ("snli-ve", {"record": {"gold_label": "yes"}}, "line 2: gold_label"),
    ("snli-ve", {"record": {"sentence2": None}}, "line 2: sentence2"),
    ("snli-ve", {"record": {"sentence2": " "}}, "line 2: sentence2"),
    ("snli-ve", {"record": {"Flickr30K_ID": ...}}, "line 2: Flickr30K_ID: Field required"),
    ("snli-ve", {"record": {"pairID": SNLI_VE["pairID"]}}, "line 2 .*r1n.: a second record of this id"),
    ("snli-ve", {"record": {"Flickr30K_ID": "9"}}, r"line 2 \(b\): image 9.jpg or 9.png missing"),
    ("snli-ve", {"record": {"Flickr30K_ID": "../9"}}, rf"line 2 .*{LEAVES}"),
    ("csv", {"record": {"text": "  "}}, "line 3: text: .*at least 1 character"),
    ("csv", {"record": {"text": ""}}, "line 3: text"),
    ("csv", {"record": {"text": ...}}, "needs columns image and text; it has image, label, split"),
    ("csv", {"record": {"label": "a dog"}}, r"line 3: label 'a dog'; expected one of true, false"),
    ("csv", {"record": {"text": "a red square"}}, "line 3: .*this text has the opposite label in .*line 2"),
    ("csv", {"record": {"split": "training"}}, r"line 3: unknown split 'training'"),
    ("csv", {"record": {"image": "gone.jpg"}}, f"line 3: image {IMAGE_GONE}"),
    ("csv", {"record": {"image": "../2.jpg"}}, rf"line 3: .*{LEAVES}"),
    ("jsonl", {"record": {"text": ["a"]}}, "line 2: text: .*string"),
    ("jsonl", {"record": {"text": ...}}, "line 2: text: Field required"),
    ("jsonl", {"record": {"image": ...}}, "line 2: image: Field required"),
    ("jsonl", {"record": {"label": 0.5}}, "line 2: label"),
    ("jsonl", {"record": {"image2": "photos/2.jpg"}}, "line 2: .*has image2"),
    ("csv of questions", {"record": {"label": ""}}, "line 3: no label"),
    ("csv of questions", {"record": {"image": "photos/gone.jpg"}}, IMAGE_GONE),
    ("jsonl of pairs", {"record": {"label": "maybe"}}, r"line 2: label 'maybe'; expected one of true, false"),
    ("jsonl of pairs", {"record": {"image2": ...}}, "line 2: 1 images; nlvr2 takes 2"),
    ("csv of pairs", {"record": {"id": "a"}}, "mine.csv: a: a second record of this id"),
    ("csv of pairs", {"record": {"image2": "../photos/2.jpg"}}, rf"line 3: .*{LEAVES}"),
    ("csv of relations", {"record": {"label": "entails"}}, r"line 3: label 'entails'; expected one of entailment"),
]


@pytest.mark.parametrize("name", READERS)
def test_the_miniature_itself_is_sound(tmp_path, name):
    write, read = READERS[name]
    assert len(read(write(tmp_path))) >= 2


@pytest.mark.parametrize("name, changes, message", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_record_is_named_with_its_file(tmp_path, name, changes, message):
    write, read = READERS[name]
    path = write(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(tmp_path) in str(error.value)


LOST = {
    "karpathy": {"record": {"filename": "gone.jpg"}},
    "coco": {"image": {"file_name": "gone.jpg"}},
    "vg": {"image": {"id": 7, "regions": []}},
    "nlvr1": {"record": {"identifier": "gone"}},
    "vqa": {"question": {"image_id": 7}, "answer": {"image_id": 7}},
    "nlvr2": {"record": {"identifier": "gone-8-0-0"}},
    "snli-ve": {"record": {"Flickr30K_ID": "9"}},
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_goes_on_where_faults_are_collected(tmp_path, name):
    """Of two records one has lost its image: that is told once, the other is read."""
    write, read = READERS[name]
    path = write(tmp_path, **LOST.get(name, {"record": {"image": "gone.jpg"}}))
    with collected_findings() as findings:
        assert read(path)
    assert len(findings.faults) == 1 and "missing" in findings.faults[0]
