"""Files as they come: byte order marks, line ends, cut and strange json, links, zips of macOS, images of one name."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
from miniatures import NLVR2 as RECORD
from miniatures import coco, karpathy, nlvr2, picture, snli_ve, table, visual_genome, vqa, written, zipped

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import split_named
from vpworkbench.data.images import ImageFile, ImageIndex, image_index, origins
from vpworkbench.data.readers import files_below, open_annotations
from vpworkbench.data.task_readers import FORMATS, NLVR2
from vpworkbench.errors import DataError

# ------------------------------------------------------------------------------------------------- formats


def test_formats_are_told_by_content_whatever_the_name(tmp_path):
    files = {
        "karpathy": karpathy(tmp_path),
        "coco": coco(tmp_path),
        "vg": visual_genome(tmp_path),
        "vqa": vqa(tmp_path),
        "nlvr2": nlvr2(tmp_path),
        "snli-ve": snli_ve(tmp_path),
        "table": table(tmp_path, kind="jsonl"),
        "vqa-answers": tmp_path / "v2_mscoco_val2014_annotations.json",
    }
    for kind, file in files.items():
        renamed = file.rename(file.with_name(f"{kind}.renamed"))
        assert open_annotations(renamed, FORMATS).format.name == kind


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{}", '"text"', "7", "[]", '{"images": [], "annotations": [], "categories": []}']
)
def test_unknown_content_is_told_what_is_known(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x.json: unknown format.*known here: Karpathy's JSON.*CSV \(with a header\)"):
        open_annotations(tmp_path / "x.json", FORMATS)


def test_a_task_is_no_captioned_set_and_the_reverse(tmp_path):
    with pytest.raises(DataError, match="unknown format .*identifier.*known here: Karpathy's.*04_finetune reads"):
        read_pictures(nlvr2(tmp_path))
    with pytest.raises(DataError, match="unknown format .*images.*known here: NLVR2 JSON lines; CSV"):
        NLVR2.read(karpathy(tmp_path))


@pytest.mark.parametrize(
    "name, split",
    [
        ("captions_val2014.json", "val"),
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test"),
        ("dev.json", "val"),
        ("snli_ve_train.jsonl", "train"),
        ("test1.json", "test"),
        ("mine.csv", ""),
        ("retrain.csv", ""),
        ("Validation.csv", "val"),
        ("trainval.json", ""),
    ],
)
def test_splits_by_the_name_of_a_file(tmp_path, name, split):
    assert split_named(tmp_path / name) == split


def test_hidden_files_are_no_annotations(tmp_path):
    karpathy(tmp_path)
    for name in ("._dataset_mine.json", ".ipynb_checkpoints/a.csv", "__MACOSX/dataset_mine.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert files_below(tmp_path, FORMATS) == ({"karpathy": [tmp_path / "dataset_mine.json"]}, [])
    assert len(read_pictures(tmp_path)) == 3


# --------------------------------------------------------------------------------------------------- texts


def recoded(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("write", [karpathy, nlvr2, table])
@pytest.mark.parametrize("change", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n")])
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path, write, change):
    path = write(tmp_path)
    read = (lambda: NLVR2.read(path)["val"]) if write is nlvr2 else (lambda: read_pictures(path))
    before = read()
    recoded(path, change)
    assert read() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"\xff\xfe{\0}\0", "cannot be read as UTF-8"),
        (b'{"images": [', "not JSON .*file complete"),
        (b"<html>", "not JSON"),
        (b"[" * 5_000, "not JSON"),
        (b'{"images": [' + b"9" * 5_000 + b"]}", "not JSON .*digits"),
        (b'[{"regions": [], "id": 1}] x', "more text after the end of its list"),
        (b'[{"regions": [], "id": 1}', r"\[1\]: not JSON"),
    ],
)
def test_files_that_are_no_json(tmp_path, content, message):
    (tmp_path / "dataset_x.json").write_bytes(content)
    picture(tmp_path / "1.jpg")
    with pytest.raises(DataError, match=message) as error:
        read_pictures(tmp_path / "dataset_x.json")
    assert str(tmp_path) in str(error.value)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "dataset_x.json").mkdir()
    with pytest.raises(DataError, match="holds no annotation file"):
        read_pictures(tmp_path)


def test_numbers_that_are_none_or_too_large(tmp_path):
    path = karpathy(tmp_path)
    for number in ("NaN", "Infinity", "1e999", "1" * 400):
        path.write_text(path.read_text().replace('"filename": "101.jpg"', f'"filename": {number}'))
        with pytest.raises(DataError, match=r"images\[1\]: filename: .*string"):
            read_pictures(path)
        karpathy(tmp_path)


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    path = nlvr2(tmp_path)
    path.write_text(json.dumps(RECORD | {"sentence": "two\u2028dogs\x85here"}, ensure_ascii=False) + "\n")
    assert NLVR2.read(path)["val"][0].text == "two dogs here"


def test_cut_lines_are_named(tmp_path):
    path = recoded(nlvr2(tmp_path), lambda data: b"\n" + data[:-20])
    with pytest.raises(DataError, match="line 3: not JSON"):
        NLVR2.read(path)["val"]
    path.write_text(json.dumps(RECORD) + " 7\n" + json.dumps(RECORD))
    with pytest.raises(DataError, match="line 1: not JSON .Extra data"):
        NLVR2.read(path)["val"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('image,text\n1.jpg,"a', "line 2: not CSV .*correct the quotes"),
        ("image,text\n1.jpg,a,b\n", "line 2: not 2 cells"),
        ("image,text,text\n", "a column twice in the header .image, text, text."),
        ("image:text\n1.jpg:a\n", "its keys are image:text"),
        ("image,text\n", "holds no record"),
        ("1.jpg,a\n2.jpg,b\n", "its keys are 1.jpg, a"),
        ('image,text\n1.jpg,"a"b\n', "line 2: not CSV"),
    ],
)
def test_broken_csv(tmp_path, content, message):
    picture(tmp_path / "1.jpg")
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_pictures(tmp_path)


def test_csv_with_quoted_lines_blank_rows_and_other_columns(tmp_path, caplog):
    picture(tmp_path / "1.jpg")
    (tmp_path / "train.csv").write_text('note,image , text\n\nx,1.jpg,"a, ""b""\nc"\n\n')
    (only,) = read_pictures(tmp_path)
    assert only.captions == ('a, "b" c',)
    assert "columns that are not read: note" in caplog.text


# -------------------------------------------------------------------------------------------------- images


def test_zips_of_macos_and_nested_folders(tmp_path):
    real = picture(tmp_path / "one.png")
    (tmp_path / "._one.png").write_bytes(b"attributes")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "._one.png", "__MACOSX/a/._one.png")
        archive.write(tmp_path / "._one.png", "a/b/._one.png")
        archive.write(real, "a/b/one.png")
        archive.mkdir("a/empty.png")
    index = ImageIndex([tmp_path / "images.zip"])
    assert index.find("one.png").name == "a/b/one.png"
    for name in ("._one.png", "empty.png"):
        with pytest.raises(DataError, match=f"image {name} missing in .*images.zip"):
            index.find(name)


def test_names_are_compared_as_people_read_them(tmp_path):
    picture(tmp_path / "set" / "cafe\u0301.png")  # as macOS writes é
    picture(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "windows.ZIP", "w") as archive:
        archive.write(tmp_path / "x.png", "a\\b\\日本.png")
    index = ImageIndex([tmp_path / "set", tmp_path / "windows.ZIP"])
    assert index.find("caf\u00e9.png").pixels().shape == (4, 6, 3)
    assert index.find("b/日本.png").pixels().shape == (4, 6, 3)


@pytest.mark.parametrize(
    "name, text",
    [
        ("mine.csv", 'image;text\n1.png;"a; b"\n'),
        ("mine.csv", 'image, text\n1.png, "a; b"\n'),
        ("mine.csv", "image\ttext\n1.png\ta; b\n"),
        ("captions.txt", "image,caption\n1.png,a; b\n"),
    ],
)
def test_a_table_may_have_other_separators(tmp_path, name, text):
    """As spreadsheets write them; `captions.txt` is Flickr8k at Kaggle."""
    picture(tmp_path / "1.png")
    (tmp_path / name).write_text(text)
    (only,) = read_pictures(tmp_path)
    assert (only.id, only.captions) == ("1.png", ("a; b",))


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    picture(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = image_index(tmp_path / "set" / "mine.csv")
    assert index.find("1.jpg").read()
    with pytest.raises(DataError, match="image 2.jpg missing"):
        index.find("2.jpg")


def test_images_of_one_name_are_not_confused(tmp_path):
    for place, name in enumerate(("a/1.jpg", "b/1.jpg", "c/x/1.jpg")):
        picture(tmp_path / name, (90 * place, 0, 0))
    index = image_index(tmp_path / "mine.csv")
    for name in ("a/1.jpg", "b/1.jpg", "x/1.jpg", "c/x/1.jpg", "./a/1.jpg"):
        assert f"{index.find(name)}".endswith(name.removeprefix("."))
    with pytest.raises(DataError, match="image 1.jpg exists 2 times.*write the folder before the name"):
        index.find("1.jpg")
    with pytest.raises(DataError, match="image d/1.jpg missing"):
        index.find("d/1.jpg")
    picture(tmp_path / "1.jpg", (7, 7, 7))  # right beside the annotations: that is what is written
    assert image_index(tmp_path / "mine.csv").find("1.jpg") == ImageFile(tmp_path, "1.jpg")


def test_copies_of_one_name_are_one_image(tmp_path):
    for folder in ("a", "b"):
        picture(tmp_path / folder / "1.jpg")
    assert image_index(tmp_path / "mine.csv").find("1.jpg").folder.name == "a"


def test_an_unpacked_zip_is_not_a_second_set(tmp_path):
    images = [picture(tmp_path / "images" / f"{number}.png") for number in range(3)]
    zipped(tmp_path / "images.zip", *images[:2], under="images/")
    index = image_index(tmp_path / "mine.csv")
    assert index.find("1.png").in_zip and index.places == [tmp_path / "images.zip"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such folder or zip"),
        (lambda path: path.write_bytes(b"PK no"), "not a complete zip"),
        (lambda path: path.mkdir(), "not a complete zip"),
        (lambda path: path.write_bytes(b""), "not a complete zip"),
    ],
)
def test_places_that_hold_no_images(tmp_path, make, message):
    make(tmp_path / "images.zip")
    with pytest.raises(DataError, match=f"images.zip: {message}"):
        ImageIndex([tmp_path / "images.zip"])


def test_no_images_beside(tmp_path):
    path = karpathy(tmp_path)
    (tmp_path / "images").rename(tmp_path / ".images")
    with pytest.raises(DataError, match="dataset_mine.json: no images beside it; put their folder or zip there, or"):
        read_pictures(path)
    (tmp_path / ".images").rename(tmp_path.parent / f"{tmp_path.name}-images")
    assert len(read_pictures(path, images=f"{tmp_path}-images")) == 3


def test_images_of_other_sets_in_the_folder_above_are_not_taken(tmp_path):
    path = written(
        tmp_path / "set" / "dataset_x.json",
        {"images": [{"filename": "1.jpg", "split": "val", "sentences": [{"raw": "x"}]}]},
    )
    picture(tmp_path / "other" / "1.jpg")
    picture(tmp_path / "set" / "images" / "2.jpg")
    with pytest.raises(DataError, match="image 1.jpg missing"):
        read_pictures(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights(tmp_path):
    (tmp_path / "images").mkdir(mode=0)
    with pytest.raises(DataError, match="images: cannot be listed"):
        ImageIndex([tmp_path / "images"])


@pytest.mark.parametrize(
    "name, told, found",
    [
        ("train2014/COCO_train2014_000000000009.jpg", {}, {"coco:9"}),
        ("val2017/000000000139.jpg", {}, {"coco:139"}),
        ("photos/000000000139.jpg", {}, set()),
        ("a.jpg", {"coco": 0}, set()),
        ("a.jpg", {"coco": -1, "flickr": -1}, set()),
        ("a.jpg", {"flickr": "0"}, set()),
        ("1.jpg", {"name": "flickr30k-images/1000268201.jpg"}, {"flickr:1000268201"}),
        ("Flicker8k_Dataset/1000268201_693b08cb0e.jpg", {}, {"flickr:1000268201"}),
        ("a.jpg", {"flickr": "1000268201_693b08cb0e.jpg"}, {"flickr:1000268201"}),
        ("a.jpg", {"flickr": 7}, {"flickr:7"}),
        ("a.jpg", {"flickr": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg"}, {"flickr:8119368305"}),
        ("a.jpg", {"flickr": "train-000001"}, set()),
        ("a.jpg", {"flickr": ""}, set()),
    ],
)
def test_ids_that_sets_have_in_common(tmp_path, name, told, found):
    assert origins(ImageFile(tmp_path, name), **told) == found
    assert origins(ImageFile(tmp_path / f"{name.split('/')[0]}.zip", name.split("/")[-1]), **told) == found
