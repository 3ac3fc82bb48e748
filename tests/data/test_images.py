"""Images as they come: colour modes, rotations, broken files."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from vpworkbench.data import images
from vpworkbench.data.images import ImageFile, inner_name
from vpworkbench.errors import DataError


def stored(tmp_path, image: Image.Image, kind: str, **options) -> ImageFile:
    image.save(tmp_path / f"image.{kind}", **options)
    return ImageFile(tmp_path, f"image.{kind}")


RED = Image.new("RGB", (4, 6), (255, 0, 0))


@pytest.mark.parametrize("mode, kind", [("RGB", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("P", "gif")])
def test_colour_modes_become_rgb(tmp_path, mode, kind):
    pixels = stored(tmp_path, RED.convert(mode), kind).pixels()
    assert pixels.shape == (6, 4, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 8


def test_grey_and_16_bit_grey_have_the_same_brightness(tmp_path):
    eight = Image.fromarray(np.full((5, 5), 200, np.uint8))
    sixteen = Image.fromarray(np.full((5, 5), 200 * 257, np.uint16))
    assert (stored(tmp_path, eight, "png").pixels() == 200).all()
    assert (stored(tmp_path, sixteen, "tiff").pixels() == 200).all()


def test_transparency_is_over_white(tmp_path):
    assert (stored(tmp_path, Image.new("RGBA", (3, 3), (0, 0, 0, 0)), "png").pixels() == 255).all()


def test_animation_gives_its_first_frame(tmp_path):
    image = stored(tmp_path, RED, "gif", save_all=True, append_images=[Image.new("RGB", (4, 6), (0, 0, 255))])
    assert (image.pixels()[0, 0] == [255, 0, 0]).all()


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert stored(tmp_path, RED, "jpg", exif=exif).pixels().shape == (4, 6, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow_also_with_a_damaged_tag(tmp_path, orientation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = stored(tmp_path, noise, "png", exif=exif)
    with Image.open(tmp_path / "image.png") as opened:
        expected = np.array(ImageOps.exif_transpose(opened))
    assert (image.pixels() == expected).all()
    exif[ExifTags.Base.XResolution] = 72.0
    data = stored(tmp_path, noise, "jpg", exif=exif, quality=95)
    whole, content = data.pixels(), bytearray((tmp_path / "image.jpg").read_bytes())
    entry = content.index(b"\x01\x1a\x00\x05") if b"\x01\x1a\x00\x05" in content else content.index(b"\x1a\x01\x05\x00")
    content[entry + 2 : entry + 4] = b"\x0c\x0c"  # the resolution has another type
    (tmp_path / "image.jpg").write_bytes(content)
    assert (data.pixels() == whole).all()


def test_one_pixel_fills_the_square(tmp_path):
    pixels = stored(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)), "png").pixels(32)
    assert pixels.shape == (32, 32, 3) and (pixels == [1, 2, 3]).all()


def broken(tmp_path, kind: str) -> ImageFile:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "png")
    data = {"empty": b"", "truncated": buffer.getvalue()[:2_000], "text": b"no image at all"}[kind]
    (tmp_path / "broken.png").write_bytes(data)
    return ImageFile(tmp_path, "broken.png")


@pytest.mark.parametrize("kind, reason", [("empty", "decoded"), ("truncated", "decoded"), ("text", "decoded")])
def test_broken_image_names_file_and_remedy(tmp_path, kind, reason):
    with pytest.raises(DataError, match=f"broken.png.*{reason}.*drop its record"):
        broken(tmp_path, kind).pixels()


def test_image_of_200_megapixels_is_refused(tmp_path):
    image = stored(tmp_path, Image.new("1", (20_000, 10_000)), "png")
    with pytest.raises(DataError, match="image.png: cannot be decoded"):
        image.pixels()


def test_missing_image_and_damaged_zip(tmp_path):
    with pytest.raises(DataError, match="absent.png.*missing"):
        ImageFile(tmp_path, "absent.png").read()
    (tmp_path / "images.zip").write_bytes(b"PK not really")
    with pytest.raises(DataError, match="images.zip.*not a complete zip"):
        images.archive(tmp_path / "images.zip")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", " ", "", "./."])
def test_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(DataError, match="leaves the image folder"):
        inner_name(name)


def test_names_inside_the_folder_are_made_plain():
    assert inner_name("./a//b c/é..png") == "a/b c/é..png"


def test_content_is_the_same_in_a_zip_and_in_a_folder(tmp_path):
    image = stored(tmp_path, RED, "png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "image.png", "other name.png")
    zipped = ImageFile(tmp_path / "images.zip", "other name.png")
    assert zipped.glimpse() == image.glimpse() and zipped.digest() == image.digest()
