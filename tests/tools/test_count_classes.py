"""Counting per class: against loops over what was generated, and against the bundled counts of the public lists."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from PIL import Image

from disalign import InputError, load_class_counts
from disalign.counts import bundled
from disalign_tools import count_classes, count_files
from disalign_tools.count_classes import count, kind_of, main, summary

K = 4
LABELS = (0, 1, 1, 1, 3, 255)  # never 2


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def put(folder, name, labels, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels)).save(path, **options)


def draw(folder, labels=LABELS, names=("a.png", "c.png", "b/b.png"), sizes=((9, 12), (8, 7), (10, 10))):
    """Label images; returns them in the order of their names below the folder."""
    rng = np.random.default_rng(0)
    masks = {name: rng.choice(labels, size).astype(np.uint8) for name, size in zip(names, sizes, strict=True)}
    for name, mask in masks.items():
        put(folder, name, mask)
    return [masks[name] for name in sorted(names)]


def by_loops(masks, shift=0, num_classes=K):
    """Pixels and images per class, and all pixels."""
    pixels, images, total = [0] * num_classes, [0] * num_classes, 0
    for mask in masks:
        seen = set()
        for label in mask.ravel().tolist():
            total += 1
            if 0 <= label - shift < num_classes and label != 255:
                pixels[label - shift] += 1
                seen.add(label - shift)
        for label in seen:
            images[label] += 1
    return pixels, images, total


def figures(record):
    return record["train_counts"], record["image_counts"], record["total_pixels"]


def timeless(record):
    return {key: value for key, value in record.items() if key != "date"}


def run(capsys, *argv):
    """Exit status, standard output and standard error of the command."""
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *argv):
    """The one sentence of a refusal; with an --out, nothing is left there."""
    status, out, error = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert error.startswith("error: expected ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ lists


def test_lists_add_up(tmp_path):
    first = write(tmp_path / "one.txt", "a.jpg 1\n\nwith space.jpg 1\nb.jpg 3\n")
    second = write(tmp_path / "two.txt", "c.jpg 0\nd.jpg 1\n")
    record = count([first, second], "list")
    assert record["train_counts"] == [1, 3, 0, 1]
    assert record["unit"] == "images"
    assert record["images"] == 5
    assert record["files"] == 2
    assert record["source"] == f"{first} + {second}"
    assert record["checksum"] == sha256(Path(first).read_bytes() + Path(second).read_bytes()).hexdigest()
    assert count([first], "list")["checksum"] == sha256(Path(first).read_bytes()).hexdigest()
    assert abs(datetime.fromisoformat(record["date"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_classes_behind_the_largest_label(tmp_path):
    path = write(tmp_path / "list.txt", "a.jpg 1\n")
    assert count([path], "list", num_classes=4)["train_counts"] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("a.jpg 0\nb.jpg -1\nc.jpg 1\n", (), "labels 0..999999 in 'list.txt', but 1 are not: -1 of b.jpg; correct"),
        (
            "a.jpg 0\nb.jpg 2\n",
            ("--num-classes", "2"),
            "labels 0..1 in 'list.txt', but 1 are not: 2 of b.jpg; correct",
        ),
        ("a.jpg 0\nb.jpg\n", (), "'path label' on every line of 'list.txt', but 1 differ: line 2: 'b.jpg'"),
        ("a.jpg 0.5\n", (), "'path label' on every line"),
        ("", (), "'path label' lines in 'list.txt', but it is empty"),
        (b"\x89PNG\r\n\xff", (), "a list file of 'path label' lines at 'list.txt', but: 'utf-8' codec"),
        ("a.jpg 20261120\n", (), "labels 0..999999 in 'list.txt', but 1 are not: 20261120 of a.jpg"),
        ("a.jpg " + "9" * 30, (), "'path label' on every line"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_bad_lists_are_one_sentence(tmp_path, monkeypatch, capsys, content, options, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "list.txt", content)
    before = files(tmp_path)
    assert sentence in refused(capsys, "list.txt", "--out", "new/counts.json", *options)
    assert files(tmp_path) == before
    assert not (tmp_path / "new").exists()


def public(pattern):
    folder = os.environ.get("DISALIGN_SHARED_DATA")
    if not folder:
        pytest.skip("DISALIGN_SHARED_DATA names no folder with the public lists")
    found = sorted(Path(folder).rglob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {folder}")
    return found


def test_places_lts_public_lists_have_the_bundled_counts(tmp_path, capsys):
    for number, path in enumerate(public("places_lt_train*.txt")):
        out = tmp_path / f"{number}.json"
        status, said, warned = run(capsys, path, "--out", out)
        assert (status, warned) == (0, "")
        record = json.loads(out.read_text())
        assert sum(record["train_counts"]) == record["images"] == 62_500
        assert (max(record["train_counts"]), min(record["train_counts"])) == (4_980, 5)
        assert record["train_counts"] == bundled("places_lt")["train_counts"]
        assert (
            "62500 images of 365 classes, from 4980 (class 7) down to 5 (class 88); many 131, medium 163, few 71"
            in said
        )
        assert load_class_counts(out).tolist() == load_class_counts("places_lt").tolist()


def test_the_public_lists_of_parts_agree_with_the_bundled_counts():
    """90 classes of ImageNet-LT in full, a part of iNaturalist-2018, and a balanced validation list."""
    (imagenet,) = public("imagenet_lt_train_90_classes.txt")
    counted = count([str(imagenet)], "list", num_classes=1000)["train_counts"]
    whole = bundled("imagenet_lt")["train_counts"]
    present = [label for label in range(1000) if counted[label]]
    assert len(present) == 90
    assert [counted[label] for label in present] == [whole[label] for label in present]

    (inaturalist,) = public("inaturalist2018_train_first_6583.txt")
    counted = count([str(inaturalist)], "list", num_classes=8142)["train_counts"]
    assert sum(counted) == 6583
    assert all(part <= all_ for part, all_ in zip(counted, bundled("inaturalist2018")["train_counts"], strict=True))

    (balanced,) = public("imagenet_lt_val.txt")
    assert count([str(balanced)], "list")["train_counts"] == [20] * 1000


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def photos(tmp_path):
    """Cats 2, dogs 3, no ant; and files that are no images."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("dog/1.png", "dog/more/2.PNG", "dog/3.jpg", "cat/1.png", "cat/0.jpeg"):
        put(folder, name, rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    write(folder / "cat/notes.txt", "no image")
    write(folder / "readme.txt", "in no class")
    (folder / "ant").mkdir()
    return folder


def test_folders_are_classes_in_alphabetical_order(photos):
    record = count([str(photos)], "folder")
    assert record["class_names"] == ["ant", "cat", "dog"]
    assert record["train_counts"] == [0, 2, 3]
    assert record["files"] == record["images"] == 5
    assert record["unit"] == "images"
    assert record["skipped"] == []
    names = sorted(["dog/1.png", "dog/more/2.PNG", "dog/3.jpg", "cat/1.png", "cat/0.jpeg"])
    manifest = "".join(f"{(photos / name).stat().st_size}  {name}\n" for name in names)
    assert record["checksum"] == sha256(manifest.encode()).hexdigest()


def test_folders_add_up_if_their_classes_are_the_same(photos, tmp_path, capsys):
    other = tmp_path / "other"
    put(other, "cat/9.png", np.zeros((3, 3), dtype=np.uint8))
    (other / "dog").mkdir()
    sentence = f"expected the class folders of {str(photos)!r} in {str(other)!r} too, but ant differ; add empty ones"
    assert refused(capsys, photos, other) == sentence
    (other / "ant").mkdir()
    assert count([str(photos), str(other)], "folder", num_classes=3)["train_counts"] == [0, 3, 3]


def test_images_that_are_not_there_or_empty_are_found_without_decoding(photos, tmp_path, capsys):
    write(photos / "dog/4.png", "")
    (photos / "ant/5.png").symlink_to(tmp_path / "nowhere.png")
    sentence = refused(capsys, photos, "--out", tmp_path / "counts.json")
    assert sentence == (
        f"expected whole files in {str(photos)!r}, but 2 of 7 can't be read: ant/5.png (No such file or directory), "
        "dog/4.png (empty); fetch them again, or leave them out with --skip-corrupt"
    )
    assert not (tmp_path / "counts.json").exists()

    status, _, error = run(capsys, photos, "--out", tmp_path / "counts.json", "--skip-corrupt")
    record = json.loads((tmp_path / "counts.json").read_text())
    assert status == 0
    assert record["train_counts"] == [0, 2, 3]
    assert record["skipped"] == [
        {"file": "ant/5.png", "reason": "No such file or directory"},
        {"file": "dog/4.png", "reason": "empty"},
    ]
    assert "warning: left out 2 files that can't be read: ant/5.png (No such" in error
    assert "warning: no images of 1 of the 3 classes: ant; stage two refuses" in error


def test_only_verify_decodes(photos, capsys):
    whole = (photos / "dog/1.png").read_bytes()
    write(photos / "dog/1.png", whole[: len(whole) // 2])
    write(photos / "dog/more/2.PNG", "no image")
    assert run(capsys, photos)[0] == 0
    sentence = refused(capsys, photos, "--verify")
    assert "but 2 of 5 can't be read: dog/1.png (" in sentence
    assert "dog/more/2.PNG (not an image)" in sentence
    record = json.loads(run(capsys, photos, "--verify", "--skip-corrupt")[1])
    assert record["train_counts"] == [0, 2, 1]


def test_folders_without_images_or_classes_are_refused(tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    assert "in the class folders" in refused(capsys, tmp_path, "--kind", "folder")
    assert "expected one folder per class" in refused(capsys, tmp_path / "cat", "--kind", "folder")
    assert "but there is none" in refused(capsys, tmp_path / "dog", "--kind", "folder")
    put(tmp_path, "cat/1.png", np.zeros((2, 2), dtype=np.uint8))
    assert "expected 2 class folders" in refused(capsys, tmp_path, "--num-classes", "2")


# ------------------------------------------------------------------------------------------------------------- JSON


def annotation(id_, image, category, **more):
    return {"id": id_, "image_id": image, "category_id": category, "bbox": [1, 2, 3, 4], "area": 12, **more}


def coco():
    """Ids with gaps, out of order. Instances: ant 1, cat 3, dog 0; images: ant 1, cat 2, dog 0."""
    return {
        "categories": [{"id": 40, "name": "dog"}, {"id": 2, "name": "ant"}, {"id": 7, "name": "cat"}],
        "images": [{"id": id_, "file_name": f"{id_}.png", "width": 9, "height": 9} for id_ in (5, 3, 9)],
        "annotations": [
            annotation(11, 3, 7),
            annotation(12, 5, 7, iscrowd=0),
            annotation(13, 3, 2, segmentation=[[1, 2, 3], [1, 1, 5, 1, 5, 5]]),
            annotation(14, 3, 7, segmentation={"size": [9, 9], "counts": [81]}),
            annotation(15, 9, 40, iscrowd=1),
            annotation(16, 9, 40, ignore=1),
            annotation(17, 9, 40, segmentation=[[1, 2, 3, 4]]),
        ],
    }


def test_instances_and_images_of_a_json_file(tmp_path, capsys):
    path = write(tmp_path / "train.json", json.dumps(coco()))
    out = tmp_path / "counts.json"
    status, said, error = run(capsys, path, "--out", out)
    record = json.loads(out.read_text())
    assert status == 0
    assert record["class_names"] == ["ant", "cat", "dog"]
    assert record["train_counts"] == load_class_counts(out).tolist() == [1, 3, 0]
    assert record["image_counts"] == load_class_counts(out, unit="images").tolist() == [1, 2, 0]
    assert record["left_out"] == 3
    assert record["images"] == 3
    assert record["files"] == 1
    assert record["checksum"] == sha256(Path(path).read_bytes()).hexdigest()
    assert (
        "4 instances (3 more left out: 2 as crowds or ignored, 1 as polygons of less than three points) in 3 images"
        in said
    )
    assert "of 3 classes, from 3 (cat) down to 0 (dog); f 0, c 0, r 3" in said
    assert error == (
        "warning: no instances of 1 of the 3 classes: dog; stage two refuses them by default: leave these classes "
        "out, or add examples\n"
    )


def test_json_files_add_up_if_their_categories_are_the_same(tmp_path, capsys):
    first = write(tmp_path / "1.json", json.dumps(coco()))
    second = write(tmp_path / "2.json", json.dumps(coco(), indent=1))
    record = count([first, second], "coco")
    assert (record["train_counts"], record["image_counts"], record["images"]) == ([2, 6, 0], [2, 4, 0], 6)
    content = coco()
    content["categories"][0]["name"] = "wolf"
    write(tmp_path / "2.json", json.dumps(content))
    assert refused(capsys, first, second).endswith("2.json' too, but ids or names differ")


def changed(part, place, **changes):
    content = coco()
    content[part][place] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (
            changed("annotations", 0, category_id=3),
            (),
            "the categories in 'a.json', but 1 have another category_id: 3 of",
        ),
        (changed("annotations", 0, category_id=[7]), (), "another category_id: [7] of annotation 11; drop"),
        (changed("annotations", 1, image_id=4), (), "the images in 'a.json', but 1 have another image_id: 4 of"),
        (changed("annotations", 1, bbox=None), (), "boxes [x, y, width, height]"),
        (changed("images", 1, id=5), (), "ids of the images in 'a.json', each once, got 5 again"),
        ({"images": [], "annotations": []}, (), "got no 'categories'; is it in LVIS or COCO format?"),
        ([1, 2], (), "got no 'categories'"),
        (coco() | {"images": []}, (), "expected images and categories"),
        ('{"images": [', (), "expected annotations as JSON in 'a.json', but: "),
        (coco(), ("--num-classes", "4"), "expected 4 categories, as --num-classes says, got 3 in 'a.json'"),
    ],
    ids=range(10),
)
def test_bad_annotation_files_are_one_sentence(tmp_path, monkeypatch, capsys, content, options, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", content if isinstance(content, str) else json.dumps(content))
    before = files(tmp_path)
    assert sentence in refused(capsys, "a.json", "--out", "counts.json", *options)
    assert files(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------ masks


def test_pixels_and_images_of_masks(tmp_path, capsys):
    masks = draw(tmp_path / "masks")
    write(tmp_path / "masks/notes.txt", "no mask")
    write(tmp_path / "masks/._a.png", "what a Mac leaves behind")
    out = tmp_path / "counts.json"
    status, said, error = run(capsys, tmp_path / "masks", "--out", out, "--num-classes", K, "--kind", "masks")
    record = json.loads(out.read_text())
    assert status == 0
    assert figures(record) == by_loops(masks)
    assert record["train_counts"] == load_class_counts(out).tolist()
    assert record["image_counts"] == load_class_counts(out, unit="images").tolist()
    assert record["unit"] == "pixels"
    assert record["files"] == record["images"] == 3
    assert record["ignore_index"] == 255
    lines = [(sha256((tmp_path / "masks" / name).read_bytes()), name) for name in ("a.png", "b/b.png", "c.png")]
    manifest = "".join(f"{digest.hexdigest()}  {name}\n" for digest, name in lines)
    assert record["checksum"] == sha256(manifest.encode()).hexdigest()
    ignored = sum(int((mask == 255).sum()) for mask in masks)
    assert f"{sum(record['train_counts'])} pixels ({ignored} more ignored) in 3 masks of 4 classes" in said
    assert "head 3, body 0, tail 1 classes" in said
    assert "no pixels of 1 of the 4 classes: class 2; stage two" in error


def test_the_groups_are_shares_of_all_pixels_ignored_ones_too(tmp_path):
    mask = np.full((100, 100), 255, dtype=np.uint8)
    mask[0, :] = 0  # 1 % of all pixels: body; of the labelled ones: 99 %
    mask[1, 0] = 1
    put(tmp_path, "a.png", mask)
    assert summary(count([str(tmp_path)], "masks")).endswith("head 0, body 1, tail 1 classes")


def test_the_number_of_classes_is_the_largest_label_and_one(tmp_path):
    masks = draw(tmp_path, labels=(0, 2, 255))
    assert figures(count([str(tmp_path)], "masks")) == by_loops(masks, num_classes=3)


def test_reduce_zero_label_shifts_and_ignores_zero(tmp_path, capsys):
    masks = draw(tmp_path, labels=(0, 1, 2, 4, 255))
    record = json.loads(run(capsys, tmp_path, "--reduce-zero-label", "--kind", "masks")[1])
    assert figures(record) == by_loops(masks, shift=1)
    assert record["reduce_zero_label"] is True
    sentence = refused(capsys, tmp_path, "--kind", "masks", "--reduce-zero-label", "--ignore-index", "0")
    assert "expected the ignored label 255 with reduce_zero_label" in sentence


def test_masks_of_folders_add_up(tmp_path):
    masks = draw(tmp_path / "one") + draw(tmp_path / "two", labels=(2, 1))
    record = count([str(tmp_path / "one"), str(tmp_path / "two")], "masks")
    assert figures(record) == by_loops(masks)
    assert record["files"] == 6


@pytest.mark.parametrize("kind", ["palette", "two colours", "16 bit", "32 bit"])
def test_the_label_is_the_index_whatever_the_format(tmp_path, kind):
    labels = np.array([[0, 1, 1], [0, 1, 1]], dtype=np.uint8)
    if kind == "palette":
        image = Image.fromarray(labels, mode=None).convert("P")
        image.putpalette([250, 3, 3, 7, 200, 7])
    elif kind == "two colours":
        image = Image.fromarray(labels.astype(bool))
    elif kind == "16 bit":
        labels = np.where(labels == 1, 300, 0).astype(np.uint16)
        image = Image.fromarray(labels)
    else:
        image = Image.fromarray(labels.astype(np.int32))
    suffix = ".tif" if kind == "32 bit" else ".png"
    image.save(tmp_path / f"a{suffix}")
    record = count([str(tmp_path)], "masks", suffix=suffix)
    expected = [2, *[0] * (labels.max() - 1), 4]
    assert record["train_counts"] == expected


def test_the_ignored_label_wins_over_a_class(tmp_path):
    put(tmp_path, "a.png", np.array([[0, 1, 1, 2]], dtype=np.uint8))
    record = count([str(tmp_path)], "masks", num_classes=3, ignore_index=1)
    assert figures(record) == ([1, 0, 1], [1, 0, 1], 4)


def test_the_suffix_chooses_among_the_files(tmp_path, capsys):
    masks = draw(tmp_path, names=("a_labels.png", "b/b_labels.png"), sizes=((4, 4), (5, 5)))
    put(tmp_path, "a_color.png", np.zeros((4, 4, 3), dtype=np.uint8))
    record = json.loads(run(capsys, tmp_path, "--kind", "masks", "--suffix", "_labels.png", "--num-classes", K)[1])
    assert figures(record) == by_loops(masks)
    assert "expected label images '*.tif' in" in refused(capsys, tmp_path, "--kind", "masks", "--suffix", ".tif")


def test_any_number_of_workers_gives_the_same_record(tmp_path):
    rng, masks = np.random.default_rng(0), tmp_path / "masks"
    for number in range(40):
        put(masks, f"{number}.png", rng.integers(0, 9, (number + 1, 50), dtype=np.uint8))
        if number % 7 == 0:
            write(masks / f"{number}_broken.png", bytes(number))
    records = [timeless(count([str(masks)], "masks", workers=w, skip_corrupt=True)) for w in (0, 1, 2, 8, None)]
    assert len(records[0]["skipped"]) == 6
    assert all(record == records[0] for record in records)
    folder = [timeless(count([str(tmp_path)], "folder", workers=w, skip_corrupt=True)) for w in (0, 2)]
    assert folder[0] == folder[1]
    assert folder[0]["train_counts"] == [45]  # only one of the 6 is empty; the others nobody decodes


def test_one_thread_per_cpu_eight_at_most(tmp_path, monkeypatch):
    asked, pool = [], count_files.ThreadPoolExecutor
    monkeypatch.setattr(count_files, "ThreadPoolExecutor", lambda workers: asked.append(workers) or pool(workers))
    put(tmp_path, "a.png", np.zeros((2, 2), dtype=np.uint8))
    for cpus in (3, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)), raising=False)
        count([str(tmp_path)], "masks")
    count([str(tmp_path)], "masks", workers=5)
    count([str(tmp_path)], "masks", workers=0)
    assert asked == [3, 8, 5, 1]


def test_a_bar_shows_the_progress_on_a_terminal(tmp_path, monkeypatch):
    bars, bar = [], count_files.tqdm
    monkeypatch.setattr(count_files, "tqdm", lambda *args, **options: bars.append(options) or bar(*args, **options))
    draw(tmp_path)
    count([str(tmp_path)], "masks")
    assert (bars[0]["desc"], bars[0]["total"], bars[0]["disable"]) == ("masks", 3, None)


@pytest.fixture
def broken(tmp_path):
    """Three valid masks, and four files that are not."""
    folder = tmp_path / "masks"
    masks = draw(folder)
    noise = np.random.default_rng(1).integers(0, 3, (40, 40), dtype=np.uint8)
    put(folder, "cut.png", noise)
    whole = (folder / "cut.png").read_bytes()
    write(folder / "cut.png", whole[: len(whole) // 2])
    write(folder / "empty.png", "")
    write(folder / "text.png", "no image")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    return folder, masks


def test_corrupt_masks_stop_the_command(broken, capsys, tmp_path):
    folder, _ = broken
    sentence = refused(capsys, folder, "--kind", "masks", "--out", tmp_path / "counts.json")
    assert sentence.startswith(f"expected whole files in {str(folder)!r}, but 4 of 7 can't be read: cut.png (")
    assert "empty.png (empty), gone.png (No such file or directory) and 1 more; fetch them again, or leave" in sentence
    assert not (tmp_path / "counts.json").exists()


def test_corrupt_masks_are_skipped_named_and_counted(broken, capsys, tmp_path):
    folder, masks = broken
    status, _, error = run(capsys, folder, "--kind", "masks", "--skip-corrupt", "--out", tmp_path / "counts.json")
    record = json.loads((tmp_path / "counts.json").read_text())
    assert status == 0
    assert figures(record) == by_loops(masks)
    assert record["files"] == 3
    assert [one["file"] for one in record["skipped"]] == ["cut.png", "empty.png", "gone.png", "text.png"]
    assert record["skipped"][3] == {"file": "text.png", "reason": "not an image"}
    assert "left out 4 files that can't be read: cut.png (" in error
    for name in ("cut", "empty", "text", "gone"):
        (folder / f"{name}.png").unlink()
    assert count([str(folder)], "masks")["checksum"] == record["checksum"]


def test_masks_that_are_all_corrupt_are_refused_even_so(tmp_path, capsys):
    write(tmp_path / "a.png", "")
    sentence = refused(capsys, tmp_path, "--skip-corrupt")
    assert sentence.endswith("but 1 of 1 can't be read: a.png (empty); fetch them again")


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        (
            [[4, 200, 200]],
            ("--num-classes", 4),
            "0..3, or 255 for ignored pixels, in 'b.png', but 3 pixels are not: 1 ",
        ),
        (
            [[5]],
            ("--num-classes", 4, "--reduce-zero-label"),
            "1 are 4 (with 1 taken off, as --reduce-zero-label asks), the first at x 0, y 0; ",
        ),
        ([[255]], ("--num-classes", 4, "--ignore-index", 254), "or 254 for ignored pixels, in 'b.png', but 1 pixels "),
        (np.zeros((2, 2, 3), np.uint8), (), "one whole label per pixel in 'b.png', got an image of mode RGB; save"),
        (np.zeros((2, 2, 4), np.uint8), (), "got an image of mode RGBA"),
        (np.zeros((2, 2, 2), np.uint8), (), "got an image of mode LA"),
    ],
    ids=range(6),
)
def test_bad_labels_are_one_sentence_and_never_skipped(tmp_path, monkeypatch, capsys, labels, options, sentence):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.png", np.ones((2, 2), dtype=np.uint8))
    put(tmp_path, "b.png", np.asarray(labels, dtype=np.uint8))
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(count_classes, "_kind_of", lambda source: "masks")
        said = refused(capsys, ".", "--out", "counts.json", "--skip-corrupt", *options)
    assert sentence in said.replace("./b.png", "b.png")
    assert files(tmp_path) == before


def test_the_first_bad_label_ends_the_reading(tmp_path, monkeypatch):
    read, bar = [], count_files.tqdm
    # A shown bar does not pass the end on to what it iterates over.
    monkeypatch.setattr(count_files, "tqdm", lambda *args, **options: bar(*args, **{**options, "disable": False}))

    def slow(path, content):
        read.append(path)
        time.sleep(0.01)
        return np.array([[9]])

    monkeypatch.setattr(count_files, "read_mask", slow)
    for number in range(300):
        write(tmp_path / f"{number}.png", "x")
    with pytest.raises(InputError, match=r"labels 0\.\.8"):
        count([str(tmp_path)], "masks", num_classes=9, workers=2)
    already = len(read)
    time.sleep(0.1)
    assert len(read) == already < 30


def test_a_negative_label_a_real_number_and_nothing_but_ignored_pixels(tmp_path, capsys):
    put(tmp_path, "a.tif", np.array([[-1, 2]], dtype=np.int32))
    assert "labels 0..999999, or 255 for" in refused(capsys, tmp_path, "--kind", "masks", "--suffix", ".tif")
    put(tmp_path, "a.tif", np.array([[0.5, 2]], dtype=np.float32))
    assert "got an image of mode F" in refused(capsys, tmp_path, "--kind", "masks", "--suffix", ".tif")
    put(tmp_path, "a.tif", np.array([[5_000_000]], dtype=np.int32))
    assert "pixels are not: 1 are 5000000, the first at x 0, y 0" in refused(
        capsys, tmp_path, "--kind", "masks", "--suffix", ".tif"
    )
    put(tmp_path, "a.png", np.full((2, 2), 255, dtype=np.uint8))
    assert "but all are 255, which is ignored" in refused(capsys, tmp_path, "--kind", "masks")


# ------------------------------------------------------------------------------------------------------ the command


def test_a_folder_of_splits_is_not_taken_for_classes(tmp_path, photos, capsys):
    splits = tmp_path / "flowers"
    for split in ("train", "val"):
        shutil.copytree(photos, splits / split)
    assert main([str(splits)]) == 2
    assert "expected one folder per class in" in (error := capsys.readouterr().err)
    assert "got train, val, which look like splits; count the one that trains" in error
    assert kind_of([str(splits / "train")]) == "folder"
    assert main([str(splits), "--kind", "folder"]) == 0


def test_the_kind_is_found_in_the_content(tmp_path, photos, capsys):
    draw(tmp_path / "masks", names=("a.png", "b.png", "c.png"))
    write(tmp_path / "list.json", "a.jpg 0\n")
    write(tmp_path / "coco.txt", b"\xef\xbb\xbf\n " + json.dumps(coco()).encode())
    assert kind_of([str(tmp_path / "masks")]) == "masks"
    assert kind_of([str(photos)]) == "folder"
    assert kind_of([str(tmp_path / "list.json")]) == "list"
    assert kind_of([str(tmp_path / "coco.txt")]) == "coco"
    assert "(list), " in refused(capsys, tmp_path / "list.json", photos)
    put(photos, "stray.png", np.zeros((2, 2), dtype=np.uint8))
    assert "got both; name the --kind" in refused(capsys, photos)
    (tmp_path / "empty").mkdir()
    assert refused(capsys, tmp_path / "empty").endswith("got none")
    assert "No such file" in refused(capsys, tmp_path / "nowhere")


def test_without_out_the_json_goes_to_the_screen_alone(tmp_path, capsys):
    path = write(tmp_path / "list.txt", "a.jpg 0\nb.jpg 1\n")
    status, out, error = run(capsys, path)
    assert status == 0
    assert json.loads(out)["train_counts"] == [1, 1]
    assert error.startswith("counted: 2 images of 2 classes")


def test_an_existing_file_is_replaced_only_by_force(tmp_path, capsys):
    path, out = write(tmp_path / "list.txt", "a.jpg 0\n"), tmp_path / "new" / "counts.json"
    assert run(capsys, path, "--out", out)[0] == 0
    out.write_text("old")
    assert refused(capsys, path, "--out", out).endswith("exists; add --force to replace it")
    assert out.read_text() == "old"
    assert run(capsys, path, "--out", out, "--force")[0] == 0
    assert load_class_counts(out).tolist() == [1]
    assert [one.name for one in out.parent.iterdir()] == ["counts.json"]


def test_a_source_is_never_written_to(tmp_path, capsys):
    path = write(tmp_path / "coco.json", json.dumps(coco()))
    before = files(tmp_path)
    assert "which is read; name another" in refused(capsys, path, "--out", path, "--force")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--out", "counts.txt"), "expected the name of a .json file as --out, got 'counts.txt'"),
        (("--out", "folder.json"), "expected the name of a file as --out"),
        (("--out", "list.txt/counts.json"), "expected a place to write 'list.txt', but: "),
        (("--num-classes", "0"), "expected 1 to 1000000 as --num-classes, got 0"),
        (("--num-classes", "9999999999999"), "expected 1 to 1000000 as --num-classes"),
        (("--workers", "-1"), "expected 0 or more as --workers, got -1"),
        (("list.txt",), "expected each source once, or it counts twice, got 'list.txt', 'list.txt'"),
        (("--verify",), "expected --verify only for --kind folder, got 'list.txt' of kind list; leave it out, or"),
        (("--skip-corrupt",), "expected --skip-corrupt only for --kind folder or masks"),
        (("--ignore-index", "0"), "expected --ignore-index only for --kind masks"),
        (("--reduce-zero-label",), "expected --reduce-zero-label only for --kind masks"),
        (("--suffix", ".png"), "expected --suffix only for --kind masks"),
        (("--kind", "masks"), "expected a folder of label images at 'list.txt', but there is none"),
        (("--kind", "folder"), "expected a folder with one folder per class at 'list.txt', but there is none"),
        (("--kind", "coco"), "expected annotations as JSON in 'list.txt', but: "),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "list.txt", "a.jpg 0\n")
    (tmp_path / "folder.json").mkdir()
    before = files(tmp_path)
    assert sentence in refused(capsys, "list.txt", *options)
    assert files(tmp_path) == before


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path, out = write(tmp_path / "list.txt", "a.jpg 0\n"), tmp_path / "counts.json"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in refused(capsys, path, "--out", out, "--force")
    assert {one.name for one in tmp_path.iterdir()} == {"list.txt", "counts.json"}
    assert out.read_text() == "old"


SLOW = """
import signal, sys, time
import numpy as np
from disalign_tools import count_files
from disalign_tools.count_classes import main

def slow(path, content):
    print("reading", flush=True)
    time.sleep(0.05)
    return np.array([[0]])

count_files.read_mask = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "killed"])
def test_interrupted_it_leaves_nothing(tmp_path, number, status):
    folder = tmp_path / "masks"
    draw(folder, names=("a.png",), sizes=((2, 2),))
    for link in range(2000):
        os.link(folder / "a.png", folder / f"{link}.png")
    command = [sys.executable, "-c", SLOW, str(folder), "--out", str(tmp_path / "counts.json"), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(count_classes.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.read(7) == "reading"
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert process.returncode == status
    assert error == ("interrupted\n" if status == 130 else "")
    assert [one.name for one in tmp_path.iterdir()] == ["masks"]


SCRIPT = """
import json, runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def test_the_script_is_the_command_and_imports_no_framework(tmp_path):
    script = Path(count_classes.__file__).parents[1] / "scripts" / "count_classes.py"
    if not script.is_file():
        pytest.skip("needs the checkout")
    path = write(tmp_path / "list.txt", "a.jpg 0\n")
    command = [sys.executable, "-c", f"import sys; sys.argv = {[str(script), path]!r}{SCRIPT}"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert timeless(json.loads(done.stdout)) == timeless(count([path], "list"))
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert not {"mmengine", "mmcv", "mmseg", "detectron2", "timm", "torchvision", "disalign_cls"} & set(loaded)


def test_a_count_that_is_refused_is_an_input_error_for_python_too(tmp_path):
    with pytest.raises(InputError, match="expected each source once"):
        count([str(tmp_path), f"{tmp_path}/."], "masks")


INAT = {
    "images": [{"id": number, "file_name": f"train/{number}.jpg", "width": 8, "height": 8} for number in (7, 3, 5)],
    "annotations": [
        {"id": number, "image_id": number, "category_id": label} for number, label in ((3, 9), (5, 4), (7, 9))
    ],
    "categories": [{"id": 9, "name": "owl"}, {"id": 4, "name": "bat"}, {"id": 6, "name": "asp"}],
}


def test_a_json_of_images_and_their_classes_is_counted(tmp_path, capsys):
    (tmp_path / "train2018.json").write_text(json.dumps(INAT))
    status, out, _ = run(capsys, str(tmp_path / "train2018.json"))
    record = json.loads(out)
    assert status == 0
    assert (record["unit"], record["images"]) == ("images", 3)
    assert record["class_names"] == ["bat", "asp", "owl"]
    assert record["train_counts"] == [1, 0, 2]


def test_an_image_of_several_classes_is_refused(tmp_path, capsys):
    more = [*INAT["annotations"], {"id": 99, "image_id": 3, "category_id": 4}]
    (tmp_path / "a.json").write_text(json.dumps(INAT | {"annotations": more}))
    assert "1 have none or several: train/3.jpg" in refused(capsys, str(tmp_path / "a.json"))


def test_what_is_left_out_is_said_with_its_reason(tmp_path, capsys):
    annotations = [one | {"bbox": [0, 0, 2, 2], "iscrowd": int(one["category_id"] == 9)} for one in INAT["annotations"]]
    annotations[1]["segmentation"] = [[0, 0, 1, 1]]
    annotations.append(annotations[1] | {"id": 8, "segmentation": [[0, 0, 1, 1, 0, 1]]})
    (tmp_path / "a.json").write_text(json.dumps(INAT | {"annotations": annotations}))
    status, out, error = run(capsys, str(tmp_path / "a.json"))
    record = json.loads(out)
    assert status == 0
    assert record["left_out"] == 3
    assert record["left_out_as"] == {"crowds or ignored": 2, "polygons of less than three points": 1}
    assert "(3 more left out: 2 as crowds or ignored, 1 as polygons of less than three points)" in error
    assert "2 of 3 annotations are crowds or ignored and do not train; if they are objects" in error


@pytest.mark.parametrize("line", ["img/a.jpg 1 0 0 1", "a.jpg 0.5 1", "a.jpg -1 1"])
def test_several_labels_on_a_line_are_refused(line, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"b.jpg 0\n{line}\n")
    sentence = refused(capsys, str(tmp_path / "list.txt"))
    assert "expected one label on every line" in sentence
    assert f"1 have several: line 2: {line!r}" in sentence


def test_a_path_with_blanks_and_numbers_counts_where_it_is_there(tmp_path, capsys):
    (tmp_path / "photo 12").touch()
    (tmp_path / "list.txt").write_text("photo 12 3\nKoala 1.jpg 0\n")
    assert json.loads(run(capsys, str(tmp_path / "list.txt"))[1])["train_counts"] == [1, 0, 0, 1]


@pytest.mark.parametrize("digits", [19, 5000])
def test_a_label_of_many_digits_is_one_sentence(digits, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"a.jpg {'9' * digits}\n")
    assert "expected 'path label' on every line" in refused(capsys, str(tmp_path / "list.txt"))


def test_a_foreground_saved_as_the_ignored_label_is_said(tmp_path, capsys):
    Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)).save(tmp_path / "a.png")
    status, out, error = run(capsys, str(tmp_path), "--kind", "masks")
    assert (status, json.loads(out)["train_counts"]) == (0, [2])
    assert "pixels of one class alone, and 2 ignored ones; if 255 is the foreground, save it as 1" in error


@pytest.mark.parametrize("kind", ["guessed", "list", "coco"])
def test_a_pipe_is_not_waited_for(kind, tmp_path, capsys):
    os.mkfifo(tmp_path / "a")
    more = [] if kind == "guessed" else ["--kind", kind]
    assert "a device or a pipe; save it to a file" in refused(capsys, str(tmp_path / "a"), *more)
