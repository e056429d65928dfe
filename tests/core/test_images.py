"""Folders of images, single images and masks: one reader each."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")

from PIL import Image

from disalign import InputError
from disalign.io.images import (
    count_labels,
    files_below,
    image_files,
    image_tree,
    mask_files,
    open_image,
    read_mask,
    require_labels,
)


def put(folder, *names, size=(6, 4)):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 99, 199)).save(path, format="PNG")


def below(folder, paths):
    return [os.path.relpath(path, folder) for path in paths]


@pytest.fixture
def tree(tmp_path):
    """Two classes with links to a file and a folder elsewhere, and what is hidden or no image."""
    put(tmp_path / "elsewhere", "deep/9.png", "8.png")
    folder = tmp_path / "tree"
    put(folder, "dog/b/2.PNG", "dog/1.png", "dog/z.jpg", "cat/1.png", "cat/.hidden.png", "cat/.cache/1.png")
    put(folder, ".ipynb_checkpoints/1.png", "stray.png")
    (folder / "cat/notes.txt").write_text("no image")
    (folder / "dog/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "dog/a.png").symlink_to(tmp_path / "elsewhere/8.png")
    return folder


DOGS = ["dog/1.png", "dog/a.png", "dog/z.jpg", "dog/b/2.PNG", "dog/linked/8.png", "dog/linked/deep/9.png"]


def test_an_image_tree_follows_links_and_leaves_out_what_is_hidden(tree):
    names, labelled = image_tree(str(tree))
    assert names == ["cat", "dog"]
    assert below(tree, [path for path, _ in labelled]) == ["cat/1.png", *DOGS]
    assert [label for _, label in labelled] == [0] + [1] * len(DOGS)
    assert below(tree, image_files(str(tree / "dog"))) == DOGS


def test_classes_number_the_folders_and_may_have_none(tree):
    names, labelled = image_tree(str(tree), ["dog", "emu", "cat"])
    assert names == ["dog", "emu", "cat"]
    assert [label for _, label in labelled] == [0] * len(DOGS) + [2]
    with pytest.raises(InputError, match=r"expected only folders named in classes in .*, got dog$"):
        image_tree(str(tree), ["cat", "emu"])


def test_masks_are_those_that_mmengine_lists(tree):
    fileio = pytest.importorskip("mmengine.fileio", reason="mmengine is not installed")
    for suffix in (".png", ".PNG", "1.png"):
        theirs = fileio.list_dir_or_file(str(tree), list_dir=False, suffix=suffix, recursive=True)
        assert below(tree, mask_files(str(tree), suffix)) == sorted(theirs)
    assert "cat/.cache/1.png" in below(tree, mask_files(str(tree)))


def test_images_are_those_that_torchvision_lists_but_for_hidden_ones(tree):
    """torchvision's own ``ImageFolder`` reads hidden files too."""
    folders = pytest.importorskip("torchvision.datasets.folder", reason="torchvision is not installed")
    (tree / ".ipynb_checkpoints/1.png").unlink()
    (tree / ".ipynb_checkpoints").rmdir()
    theirs = folders.ImageFolder(str(tree))
    names, labelled = image_tree(str(tree))
    assert names == theirs.classes
    shown = [one for one in theirs.samples if "/." not in one[0].removeprefix(str(tree))]
    assert sorted(labelled) == sorted(shown)
    assert len(shown) == len(theirs) - 2


@pytest.mark.parametrize(
    "target", [".", "..", "../cat"], ids=["itself", "its parent", "a folder above by another name"]
)
def test_a_link_back_is_refused(tree, tmp_path, target):
    if target == "../cat":
        (tmp_path / "other").symlink_to(tree, target_is_directory=True)
        target = tmp_path / "other"
    (tree / "cat/again").symlink_to(target, target_is_directory=True)
    for read in (image_files, mask_files, image_tree, lambda folder: list(files_below(folder))):
        with pytest.raises(InputError, match=r"folders without end below .*, but '.*cat/again' links back; remove it$"):
            read(str(tree))


def test_one_folder_by_two_names_is_read_twice(tree, tmp_path):
    (tree / "cat/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(image_files(str(tree / "cat"))) == 3


def test_a_folder_that_can_not_be_read_is_refused_not_left_out(tree, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"a folder that can be read at '.*dog/b', but: Permission denied$"):
        image_files(str(tree))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_is_opened_in_the_mode_asked_for(tree, mode):
    image = open_image(str(tree / "dog/1.png"), mode)
    expected = np.full((4, 6, 3), (9, 99, 199), dtype=np.uint8)
    if mode == "L":  # ITU-R 601-2
        expected = np.full((4, 6), round(9 * 0.299 + 99 * 0.587 + 199 * 0.114), dtype=np.uint8)
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("content", [b"", b"no image", "cut", None], ids=["empty", "text", "cut", "missing"])
def test_a_broken_image_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.png"
    Image.effect_noise((40, 30), 50).save(path)
    whole = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(
        InputError, match=r"^expected a whole image at '.*a\.png', but: .*; fetch it again, or leave it"
    ):
        open_image(str(path))


def test_a_mask_is_read_from_a_file_or_from_its_content(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "a.png"
    Image.fromarray(labels).save(path)
    assert np.array_equal(read_mask(str(path)), labels)
    content = path.read_bytes()
    path.write_bytes(b"")
    assert np.array_equal(read_mask(str(path), content), labels)
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(InputError, match=r"one whole label per pixel in '.*a\.png', got an image of mode RGB"):
        read_mask(str(path))


def test_labels_out_of_range_are_named_with_their_number_and_the_first_place():
    labels = np.array([[0, 3, 255], [7, 7, -1]])
    with pytest.raises(InputError) as caught:
        require_labels(labels, 3, 255, "a.png", " (as loaded)")
    assert str(caught.value) == (
        "expected labels 0..2, or 255 for ignored pixels, in 'a.png', but 4 pixels are not: 1 are -1, 1 are 3, 2 are 7 "
        "(as loaded), the first at x 1, y 0; correct the annotation, or the classes"
    )
    require_labels(labels[:1], 4, 255, "a.png")
    require_labels(np.full((1, 1), -1), None, -1, "a.png")
    with pytest.raises(InputError, match=r"expected labels 0\.\.999999, or 255 .*: 1 are -1, the first at x 2, y 1"):
        require_labels(labels, None, 255, "a.png")


def test_labels_are_counted_without_the_ignored_one():
    labels = np.array([[0, 3, 255], [3, 3, 1]], dtype=np.uint8)
    assert count_labels(labels, 255).tolist() == [1, 1, 0, 3]
    assert count_labels(labels, 3, 6).tolist()[:6] == [1, 1, 0, 0, 0, 0]
    assert count_labels(np.full((2, 2), -1), -1, 2).tolist() == [0, 0]


def test_pillow_is_imported_only_where_a_file_is_opened():
    code = "import sys, disalign.io.images, disalign.io.annotations; sys.exit('PIL' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}).returncode == 0


# ------------------------------------------------------------------------------------------- depth and orientation

RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def test_of_16_bits_the_upper_8_count(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP // 4).save(tmp_path / "dark.png")  # the range is the file's, not the image's
    Image.fromarray(RAMP).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert np.array_equal(np.asarray(open_image(str(tmp_path / name), "L")), RAMP >> 8)
        assert np.array_equal(np.asarray(open_image(str(tmp_path / name)))[..., 1], RAMP >> 8)
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "dark.png"), "L")), (RAMP // 4) >> 8)


def test_a_pillow_that_gives_a_png_of_16_bits_32_is_seen_through(tmp_path, monkeypatch):
    Image.fromarray(RAMP).save(tmp_path / "a.png")

    def old(path):
        image = Image.fromarray(RAMP.astype(np.int32))
        image.format = "PNG"
        return image

    monkeypatch.setattr(Image, "open", old)
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "a.png"), "L")), RAMP >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(dtype, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"expected an image of 8 or 16 bits per channel at '.*a\.tif', got one of 32"):
        open_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright(orientation, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner
    # What the camera has stored so that the tag makes it upright.
    stored = {
        **{1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]},
        **{5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2)},
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "a.png"))), upright)


def test_an_image_of_16_bits_stands_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(RAMP))).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "a.png"), "L")), RAMP >> 8)


@pytest.mark.parametrize("read", [open_image, read_mask])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="a device or a pipe; save it to a file"):
        read(str(tmp_path / "a.png"))
