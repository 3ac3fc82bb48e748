"""The pixel cache: the same pixels as the files, decoded once; changes and damage are noticed."""

import errno
import multiprocessing
import os

import numpy as np
import pytest
import torch
from conftest import narrow_model

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import ImageCache, Pixels, pixel_cache
from vpworkbench.errors import DataError
from vpworkbench.settings import DataSettings
from vpworkbench.train.objective import group_batches


@pytest.fixture
def images(scenes, tmp_path):
    """Six images in a folder."""
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(scenes[:6]):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture.image.read())
    return [ImageFile(tmp_path / "images", f"{number}.png") for number in range(6)]


def test_the_pixels_are_those_of_the_files(images, tmp_path):
    told = []
    cache = pixel_cache(tmp_path / "cache", images, 48, progress=lambda *state: told.append(state))
    assert told[-1] == ("decoding images", 6, 6)
    some = [images[4], images[1], images[4]]
    assert torch.equal(cache.stack(some), Pixels(48).stack(some))
    assert isinstance(cache.kept, np.memmap)


def test_it_is_built_once_and_anew_for_a_changed_image_or_another_size(images, tmp_path):
    def built(side=48):
        told = []
        pixel_cache(tmp_path / "cache", images, side, progress=lambda *state: told.append(state))
        return len(told) > 0

    assert [built(), built(), built(32)] == [True, False, True]
    (images[2].folder / images[2].name).write_bytes(images[3].read())
    assert built()


def test_a_damaged_image_is_noticed_when_it_is_read(images, tmp_path):
    cache = pixel_cache(tmp_path / "cache", images, 48)
    with open(cache.path / "images.npy", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"12345")
    cache = pixel_cache(tmp_path / "cache", images, 48)
    cache.stack(images[:5])
    with pytest.raises(DataError, match=r"image 5 was damaged; delete this folder"):
        cache.stack(images)


@pytest.mark.parametrize("left", [0, 100, 3000])
def test_a_file_that_was_cut_off_is_named(images, tmp_path, left):
    os.truncate(pixel_cache(tmp_path / "cache", images, 48).path / "images.npy", left)
    with pytest.raises(DataError, match=r"images-\w+: not complete .*; delete this folder, and it is built again"):
        pixel_cache(tmp_path / "cache", images, 48)


def test_a_full_disk_leaves_nothing_half_built(images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        pixel_cache(tmp_path / "cache", images, 48)
    monkeypatch.undo()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir() or path.suffix == ".npy"] == []
    assert len(pixel_cache(tmp_path / "cache", images, 48).kept) == 6


def test_batches_from_it_are_the_same(scenes, tmp_path):
    model = narrow_model(scenes)
    data = DataSettings(flip=True)
    cache = pixel_cache(tmp_path / "cache", [picture.image for picture in scenes], 96)
    plain, cached = (group_batches(scenes, model, data, images=4, seed=0, inputs=each)[3] for each in (None, cache))
    assert torch.equal(plain.images, cached.images) and torch.equal(plain.words, cached.words)


def test_both_ways_are_kept_where_a_row_cannot_be_mirrored(images, tmp_path):
    def leftmost(files, mirrored):
        return Pixels(48).stack(files, mirrored)[..., :1].clone()  # a column: the other side is lost

    cache = ImageCache(tmp_path / "cache", images, leftmost, "left", both_ways=True)
    mirrored = np.array([True, False, True])
    assert torch.equal(cache.stack(images[:3], mirrored), leftmost(images[:3], mirrored))
    assert torch.equal(cache.stack(images[:3]), leftmost(images[:3], None))


def build(folder, images, told):
    pixel_cache(folder, images, 48, progress=lambda *_: told.put(os.getpid()))


def test_one_of_several_processes_builds_it(images, tmp_path):
    """As under `torchrun`: the others wait, and then read."""
    fresh = multiprocessing.get_context("forkserver")
    told = fresh.Queue()
    several = [fresh.Process(target=build, args=(tmp_path / "cache", images, told)) for _ in range(2)]
    for process in several:
        process.start()
    builders = [told.get(timeout=300)]
    for process in several:
        process.join(300)
        assert process.exitcode == 0
    assert builders and told.empty()  # all images in one part, by one process
    assert len(list((tmp_path / "cache").glob("images-*/images.npy"))) == 1
