"""Small sets in the layouts that their publishers, and well-known projects, have: a folder with a few records each."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miniatures import NLVR1, NLVR2, SNLI_VE, lines, picture, written

TEN = [{"answer": "down", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]


def colour(number: int) -> tuple[int, int, int]:
    """Far from those of the numbers beside it, so that no two images look alike."""
    return 50 * number % 250, 90 * number % 250, 130 * number % 250


def vqa_pair(questions: Path, annotations: Path, subset: str, ids: list[int], *, kind: str = "OpenEnded") -> None:
    """The two files of one subset; image and question have one number. A test set has no annotations."""
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    asked = [{"question_id": number, "image_id": number, "question": f"what is {number}?"} for number in ids]
    name = f"mscoco_{subset}"
    prefix = "v2_" if "v2" in questions.parts else ""
    written(questions / f"{prefix}{kind}_{name}_questions.json", header | {"task_type": kind, "questions": asked})
    if not subset.startswith("test"):
        told = [
            {"question_id": number, "image_id": number, "answers": TEN, "multiple_choice_answer": "down"}
            for number in ids
        ]
        written(annotations / f"{prefix}{name}_annotations.json", header | {"annotations": told})


def coco_images(folder: Path, subset: str, ids: list[int]) -> None:
    """As COCO names them: with the subset in 2014 and 2015, only by the number in 2017."""
    prefix = "" if subset.endswith("2017") else f"COCO_{subset}_"
    for number in ids:
        picture(folder / subset / f"{prefix}{number:012d}.jpg", colour(number))


def vqa_site(folder: Path) -> None:
    """As VQA's site and its tools have it, with both tasks of v1, and test-dev inside test."""
    for subset, ids in (("train2014", [1, 2]), ("val2014", [3]), ("test2015", [4, 5]), ("test-dev2015", [4])):
        for kind in ("OpenEnded", "MultipleChoice"):
            vqa_pair(folder / "Questions", folder / "Annotations", subset, ids, kind=kind)
        coco_images(folder / "Images" / "mscoco", subset.replace("-dev", ""), ids)


def vqa_v2(folder: Path) -> None:
    for subset, ids in (("train2014", [1, 2]), ("val2014", [3]), ("test2015", [4])):
        vqa_pair(folder / "v2", folder / "v2", subset, ids)
        coco_images(folder, subset, ids)


def vqa_unpacked(folder: Path) -> None:
    """Each zip of VQA v2 unpacked to a folder of its name."""
    for subset, part, ids in (("train2014", "Train", [1, 2]), ("val2014", "Val", [3])):
        vqa_pair(folder / f"v2_Questions_{part}_mscoco", folder / f"v2_Annotations_{part}_mscoco", subset, ids)
        coco_images(folder, subset, ids)


def ok_vqa(folder: Path) -> None:
    for subset, ids in (("train2014", [1, 2]), ("val2014", [3])):
        vqa_pair(folder, folder, subset, ids)
        coco_images(folder, subset, ids)


def a_okvqa(folder: Path) -> None:
    """Lists with choices; test without answers. Direct answers to the question `hard` are not scored."""
    for number, split in enumerate(("train", "val", "test"), 1):
        picture(folder / f"{split}2017" / f"{number:012d}.jpg", colour(number))
        asked = {"split": split, "image_id": number, "question": "What for?", "choices": ["a", "b", "c", "d"]}
        told = {"correct_choice_idx": 1, "direct_answers": ["b"] * 9 + ["bee"], "rationales": ["So."]}
        records = [
            asked | {"question_id": f"{split}-{kind}", "difficult_direct_answer": kind == "hard"}
            for kind in ("ab", "hard")
        ]
        written(folder / f"aokvqa_v1p0_{split}.json", [one | (told if split != "test" else {}) for one in records])


def vqa_cp(folder: Path) -> None:
    """Lists; its test asks about COCO's train2014 too. No val."""
    for split, ids in (("train", range(1, 13)), ("test", [20])):
        subset = "train2014" if split == "train" else "val2014"
        coco_images(folder / "coco", subset, list(ids))
        asked = [
            {"split": subset, "coco_split": subset, "question_id": k, "image_id": k, "question": f"is it {k}?"}
            for k in ids
        ]
        told = [{"question_id": k, "image_id": k, "coco_split": subset, "answers": TEN} for k in ids]
        written(folder / f"vqacp_v2_{split}_questions.json", asked)
        written(folder / f"vqacp_v2_{split}_annotations.json", told)


def gqa(folder: Path) -> None:
    """Objects of records by id; the balanced questions and all of them, in parts; test without answers."""
    parts = {
        "train_balanced": [1],
        "val_balanced": [2],
        "val_all": [2, 3],
        "testdev_balanced": [4],
        "submission_all": [5],
    }
    parts |= {"train_all_questions/train_all_0": [1, 6]}
    for number in range(1, 7):
        picture(folder / "images" / f"n{number}.jpg", colour(number))
    for part, ids in parts.items():
        answer = {} if part.startswith("submission") else {"answer": "yes", "fullAnswer": "Yes, it is."}
        records = {f"0{k}": {"imageId": f"n{k}", "question": f"Is it {k}?", "isBalanced": True} | answer for k in ids}
        written(folder / "questions1.2" / f"{part}_questions.json", records)


def vizwiz(folder: Path) -> None:
    """Lists without ids; test without answers."""
    for number, split in enumerate(("train", "val", "test")):
        name = f"VizWiz_{split}_{number:08d}.jpg"
        picture(folder / split / name, colour(number))
        answers = {"answers": TEN, "answer_type": "other", "answerable": 1} if split != "test" else {}
        written(folder / "Annotations" / f"{split}.json", [{"image": name, "question": "What is this?"} | answers])


def blip_vqa(folder: Path) -> None:
    for split, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        subset = "train2014" if split == "train" else "val2014"
        coco_images(folder, subset, ids)
        names = {k: f"{subset}/COCO_{subset}_{k:012d}.jpg" for k in ids}
        answer = {"answer": ["down", "up"]} if split != "test" else {}
        asked = [{"question_id": k, "question": "what?", "image": names[k], "dataset": "vqa"} | answer for k in ids]
        written(folder / f"vqa_{split}.json", asked)


def visual_genome_questions(folder: Path) -> None:
    for number in range(1, 11):
        picture(folder / "VG_100K" / f"{number}.jpg", colour(number))
    asked = [{"qa_id": 100 + k, "image_id": k, "question": f"What is {k}?", "answer": "A dog."} for k in range(1, 11)]
    written(folder / "question_answers.json", [{"id": one["image_id"], "qas": [one]} for one in asked])


def coco_captions(folder: Path, subset: str, ids: list[int]) -> None:
    prefix = "" if subset.endswith("2017") else f"COCO_{subset}_"
    images = [{"id": k, "file_name": f"{prefix}{k:012d}.jpg", "height": 4, "width": 6} for k in ids]
    captions = [{"id": 10 * k, "image_id": k, "caption": f"A bathroom {k}."} for k in ids]
    content = {"info": {}, "licenses": [{"id": 1, "url": "", "name": "x"}], "images": images}
    written(folder / "annotations" / f"captions_{subset}.json", content | {"annotations": captions})


def coco_annotations(folder: Path) -> None:
    """COCO's whole `annotations` folder: boxes, key points, and lists of test images without a text."""
    for subset, ids in (("train2017", [1, 2]), ("val2017", [3, 4])):
        coco_images(folder, subset, ids)
        coco_captions(folder, subset, ids)
        boxes = [{"id": 7, "image_id": ids[0], "bbox": [0, 0, 1, 1], "category_id": 1, "segmentation": []}]
        for kind in ("instances", "person_keypoints"):
            images = [{"id": k, "file_name": f"{k:012d}.jpg"} for k in ids]
            content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
            written(folder / "annotations" / f"{kind}_{subset}.json", content)
    tested = {"info": {}, "images": [{"id": 9, "file_name": f"{9:012d}.jpg"}], "licenses": [], "categories": []}
    for name in ("image_info_test2017.json", "image_info_test-dev2017.json", "mine.json"):
        written(folder / "annotations" / name, tested)


def karpathy_beside_coco_2017(folder: Path) -> None:
    """Karpathy's names are those of 2014; the images were fetched in 2017's folders."""
    coco_images(folder, "train2017", [1, 2])
    coco_images(folder, "val2017", [3])
    coco_captions(folder, "val2017", [3])  # what Karpathy's file replaces
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{k:012d}.jpg",
            "cocoid": str(k),
            "split": split,
            "sentences": [{"raw": f"A dog {k}."}],
        }
        for k, split in ((1, "restval"), (2, "train"), (3, "val"))
    ]
    written(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def karpathy_lists(folder: Path) -> None:
    """BLIP's and ALBEF's lists: one caption a record in training, all of an image elsewhere; with LAVIS' two others."""
    for split, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        subset = "val2014"
        coco_images(folder / "images", subset, ids)
        names = {k: f"{subset}/COCO_{subset}_{k:012d}.jpg" for k in ids}
        if split == "train":
            records = [
                {"caption": f"a dog {k} {n}", "image": names[k], "image_id": f"coco_{k}"} for k in ids for n in (1, 2)
            ]
        else:
            records = [{"image": names[k], "caption": [f"a dog {k}", f"a dog {k}", "a cat"]} for k in ids]
            truth = [{"image_id": k, "caption": "a cat", "id": k} for k in ids]
            written(
                folder / "annotations" / f"coco_karpathy_{split}_gt.json",
                {"annotations": truth, "images": [{"id": k} for k in ids]},
            )
        written(folder / "annotations" / f"coco_karpathy_{split}.json", records)


def albef_lists(folder: Path) -> None:
    """ALBEF's lists have paths of their authors' machine."""
    coco_images(folder / "images", "val2014", [1, 2])
    for split, number in (("train", 1), ("val", 2)):
        image = f"/export/share/datasets/vision/coco/images/val2014/COCO_val2014_{number:012d}.jpg"
        written(folder / f"coco_{split}.json", [{"image": image, "caption": f"a dog {number}"}])


def token_lines(names: list[str]) -> str:
    return "".join(f"{name}#{k}\tA child  in {name} {k} .\n" for name in names for k in range(2))


def flickr8k(folder: Path) -> None:
    """Its texts in a folder; three lists of names; an image in none of them; a second file of lemmas."""
    names = {"train": "1000_693b08cb0e.jpg", "dev": "1001_aa.jpg", "test": "1002_bb.jpg"}
    for number, name in enumerate(names.values()):
        picture(folder / "Flicker8k_Dataset" / name, colour(number))
    texts = folder / "Flickr8k_text"
    texts.mkdir()
    lemmas = texts / "Flickr8k.lemma.token.txt"
    for file in (texts / "Flickr8k.token.txt", lemmas):
        file.write_text(token_lines([*names.values(), "2258277193_586949ec62.jpg.1"]))
    for split, name in names.items():
        (texts / f"Flickr_8k.{split}Images.txt").write_text(f"{name}\n")
    (texts / "readme.txt").write_text("1000_693b08cb0e.jpg#0\tno captions")


def flickr30k(folder: Path) -> None:
    names = [f"{number}.jpg" for number in range(1000, 1012)]
    for number, name in enumerate(names):
        picture(folder / "flickr30k-images" / name, colour(number))
    (folder / "results_20130124.token").write_text(token_lines(names))


def nlvr2_images(folder: Path, pairs: dict[str, int]) -> None:
    for pair, number in pairs.items():
        for side in (0, 1):
            picture(folder / "images" / f"{pair}-img{side}.png", colour(2 * number + side))


def nlvr2_repository(folder: Path) -> None:
    """Its repository: subsets of dev and test1 beside them, and the hidden test set as published later."""
    pairs = {"train-1-0": 1, "dev-1-0": 2, "dev-2-0": 3, "test1-1-0": 4, "test2-1-0": 5}
    nlvr2_images(folder, pairs)
    data = folder / "nlvr2" / "data"
    files = {
        "train.json": ["train-1-0"],
        "dev.json": ["dev-1-0", "dev-2-0"],
        "test1.json": ["test1-1-0"],
        "test2.json": ["test2-1-0"],
        "balanced/balanced_dev.json": ["dev-1-0"],
        "unbalanced/unbalanced_dev.json": ["dev-2-0"],
        "balanced/balanced_test1.json": ["test1-1-0"],
    }
    for name, some in files.items():
        lines(data / name, *(NLVR2 | {"identifier": f"{pair}-0"} for pair in some))


def nlvr2_lists(folder: Path) -> None:
    """LXMERT's and ViLBERT's lists."""
    nlvr2_images(folder, {"train-1-0": 1, "dev-1-0": 2, "test1-1-0": 3})
    for name, pair in (("train", "train-1-0"), ("valid", "dev-1-0"), ("test", "test1-1-0")):
        record = {"identifier": f"{pair}-0", "img0": f"{pair}-img0", "img1": f"{pair}-img1", "label": 1}
        written(folder / f"{name}.json", [record | {"sent": "Two dogs.", "uid": f"nlvr2_{name}_0"}])


def snli_ve_numbers(folder: Path) -> None:
    """Labels as the hub's data sets count them; -1 is no gold label."""
    for number, split in enumerate(("train", "dev", "test")):
        picture(folder / "flickr30k-images" / f"{number}.jpg", colour(number))
        own = {"Flickr30K_ID": str(number), "gold_label": number}
        records = [SNLI_VE | own | {"pairID": f"{number}"}, SNLI_VE | own | {"pairID": "none", "gold_label": -1}]
        lines(folder / f"snli_ve_{split}.jsonl", *records)


def e_snli_ve(folder: Path) -> None:
    """e-ViL's csv, its first column without a name."""
    header = ["", "pairID", "Flickr30kID", "hypothesis", "gold_label", "explanation"]
    for number, split in enumerate(("train", "dev", "test")):
        picture(folder / "flickr30k_images" / f"{number}.jpg", colour(number))
        (folder / "data").mkdir(exist_ok=True)
        with (folder / "data" / f"esnlive_{split}.csv").open("w", newline="") as file:
            row = [0, f"{number}.jpg#2r1c", f"{number}.jpg", "A man, asleep.", "contradiction", 'He "jogs".']
            csv.writer(file).writerows([header, row])


def e_snli_ve_2(folder: Path) -> None:
    """Do et al.'s tab-separated files: V-SNLI's columns and the explanation; train is in two parts."""
    header = ["gold_label", "sentence1_tokens", "sentence2_tokens", "image", "sentence1", "sentence2", "pairID"]
    for number, part in enumerate(("train_1", "train_2", "dev", "test")):
        picture(folder / "flickr30k_images" / f"{number}.jpg", colour(number))
        (folder / "data").mkdir(exist_ok=True)
        with (folder / "data" / f"esnli_ve_{part}.tsv").open("w", newline="") as file:
            texts = ["a man", "he is asleep", f"{number}.jpg#2", "A man.", 'He, "asleep".', f"{number}.jpg#2r1n"]
            rows = [[*header, "explanation"], ["neutral", *texts, "We\tcannot see."]]
            csv.writer(file, delimiter="\t").writerows(rows)


def nlvr1_repository(folder: Path) -> None:
    for split, directory in (("train", 0), ("dev", 5), ("test", 1)):
        for order in range(6):
            name = f"{split}-7-0-{order}.png"
            picture(folder / split / "images" / str(directory) / name, colour(order + 7 * directory))
        lines(folder / split / f"{split}.json", NLVR1 | {"directory": directory, "label": True})


LAYOUTS: dict[str, tuple[Callable[[Path], Any], str, dict[str, list[str]]]] = {
    "vqa-site": (vqa_site, "vqa", {"train": ["1", "2"], "val": ["3"], "test": ["4", "5"]}),
    "vqa-unpacked": (vqa_unpacked, "vqa", {"train": ["1", "2"], "val": ["3"], "test": []}),
    "vqa-v2": (vqa_v2, "vqa", {"train": ["1", "2"], "val": ["3"], "test": ["4"]}),
    "ok-vqa": (ok_vqa, "vqa", {"train": ["1", "2"], "val": ["3"], "test": []}),
    "a-okvqa": (a_okvqa, "vqa", {"train": ["train-ab"], "val": ["val-ab"], "test": ["test-ab"]}),
    "vqa-cp": (vqa_cp, "vqa", {"train": [str(k) for k in range(1, 13)], "val": [], "test": ["20"]}),
    "gqa": (gqa, "vqa", {"train": ["01"], "val": ["02"], "test": ["04"]}),
    "vizwiz": (
        vizwiz,
        "vqa",
        {
            "train": ["VizWiz_train_00000000.jpg"],
            "val": ["VizWiz_val_00000001.jpg"],
            "test": ["VizWiz_test_00000002.jpg"],
        },
    ),
    "blip-vqa": (blip_vqa, "vqa", {"train": ["1", "2"], "val": ["3"], "test": ["4"]}),
    "vg-questions": (
        visual_genome_questions,
        "vqa",
        {"train": [str(k) for k in range(101, 111)], "val": [], "test": []},
    ),
    "coco-annotations": (
        coco_annotations,
        "captions",
        {
            "train": ["000000000001.jpg", "000000000002.jpg"],
            "val": ["000000000003.jpg", "000000000004.jpg"],
            "test": [],
        },
    ),
    "karpathy-2017": (
        karpathy_beside_coco_2017,
        "captions",
        {
            "train": ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"],
            "val": ["COCO_val2014_000000000003.jpg"],
            "test": [],
        },
    ),
    "karpathy-lists": (
        karpathy_lists,
        "captions",
        {
            "train": ["val2014/COCO_val2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg"],
            "val": ["val2014/COCO_val2014_000000000003.jpg"],
            "test": ["val2014/COCO_val2014_000000000004.jpg"],
        },
    ),
    "albef-lists": (
        albef_lists,
        "captions",
        {
            "train": ["/export/share/datasets/vision/coco/images/val2014/COCO_val2014_000000000001.jpg"],
            "val": ["/export/share/datasets/vision/coco/images/val2014/COCO_val2014_000000000002.jpg"],
            "test": [],
        },
    ),
    "flickr8k": (
        flickr8k,
        "captions",
        {"train": ["1000_693b08cb0e.jpg"], "val": ["1001_aa.jpg"], "test": ["1002_bb.jpg"]},
    ),
    "flickr30k": (flickr30k, "captions", {"train": [], "val": [], "test": []}),  # split by a hash: see its test
    "nlvr2-repository": (
        nlvr2_repository,
        "nlvr2",
        {"train": ["train-1-0-0"], "val": ["dev-1-0-0", "dev-2-0-0"], "test": ["test1-1-0-0"]},
    ),
    "nlvr2-lists": (nlvr2_lists, "nlvr2", {"train": ["train-1-0-0"], "val": ["dev-1-0-0"], "test": ["test1-1-0-0"]}),
    "snli-ve-numbers": (snli_ve_numbers, "snli-ve", {"train": ["0"], "val": ["1"], "test": ["2"]}),
    "e-snli-ve": (e_snli_ve, "snli-ve", {"train": ["0.jpg#2r1c"], "val": ["1.jpg#2r1c"], "test": ["2.jpg#2r1c"]}),
    "e-snli-ve-2": (
        e_snli_ve_2,
        "snli-ve",
        {"train": ["0.jpg#2r1n", "1.jpg#2r1n"], "val": ["2.jpg#2r1n"], "test": ["3.jpg#2r1n"]},
    ),
    "nlvr1-repository": (
        nlvr1_repository,
        "captions",
        {"train": [f"7-0-{k}" for k in range(6)], "val": ["7-0-0"], "test": ["7-0-0"]},
    ),
}
"""Layout -> its writer, what it is read for, and the ids of its records by split."""
