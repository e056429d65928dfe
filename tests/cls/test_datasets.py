import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from disalign import InputError, load_class_counts
from disalign_cls.datasets import (
    ArrayDataset,
    DigitsLT,
    FolderDataset,
    JsonDataset,
    ListDataset,
    MissingFilesError,
    build_transforms,
    missing_files,
)
from disalign_cls.predict import find_images


def images(root, *names, mode="RGB"):
    """Small images, each of a grey of its own."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (6, 4), number if mode == "L" else (number, number, number)).save(path)


def listed(root, *lines):
    path = root / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


# --------------------------------------------------------------------------------------------------- list files


def test_a_list_gives_images_labels_and_counts(tmp_path):
    images(tmp_path / "data", "a.png", "b/c.png", "b/d.png")
    dataset = ListDataset(listed(tmp_path, "a.png 2", "b/c.png 0", "", "b/d.png 2"), str(tmp_path / "data"))
    assert len(dataset) == 3
    assert dataset.num_classes == 3
    assert dataset.class_counts.tolist() == [1, 0, 2]
    assert dataset.class_counts.dtype == torch.int64
    sample = dataset[1]
    assert sample["data_samples"] == 0
    assert torch.equal(sample["inputs"], torch.full((3, 4, 6), 1, dtype=torch.uint8))


def test_paths_may_hold_spaces(tmp_path):
    images(tmp_path, "a folder/an image.png")
    dataset = ListDataset(listed(tmp_path, "a folder/an image.png  1"), str(tmp_path))
    assert dataset.images == [str(tmp_path / "a folder/an image.png")]
    assert dataset.labels.tolist() == [1]
    assert dataset[0]["inputs"].shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("line", "rewrite"),
    [
        ("train/abbey-inner/1.png 0", ()),
        ("data_256/a/abbey/inner/1.png 0", [r"^data_256/./", "train/", r"^(train/[^/]+)/(?=[^/]+/)", r"\1-"]),
    ],
    ids=["train/", "data_256/"],
)
def test_both_path_styles_of_places_lt_lead_to_the_same_image(tmp_path, line, rewrite):
    images(tmp_path, "train/abbey-inner/1.png")
    dataset = ListDataset(listed(tmp_path, line), str(tmp_path), rewrite=rewrite)
    assert dataset.images == [str(tmp_path / "train/abbey-inner/1.png")]


@pytest.mark.parametrize("rewrite", [["["], ["[", "x"], ["a", r"\9"], 5, "ab"])
def test_a_rewrite_that_is_none_is_refused(tmp_path, rewrite):
    images(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"expected .*a pattern and a replacement .*in rewrite, got "):
        ListDataset(listed(tmp_path, "a.png 0"), str(tmp_path), rewrite=rewrite)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    images(tmp_path, "0.png")
    names = [f"{number}.png" for number in range(6)]
    with pytest.raises(
        MissingFilesError, match=r"expected 6 images .*, but 5 are missing: .*/1\.png, .* and 2 more"
    ) as e:
        ListDataset(listed(tmp_path, *(f"{name} 0" for name in names)), str(tmp_path))
    assert e.value.paths == [str(tmp_path / name) for name in names[1:]]


def test_missing_files_are_those_that_do_not_exist(tmp_path):
    images(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    paths = [str(tmp_path / name) for name in ("a/1.png", "a/3.png", "c/1.png", "b/1.png", "b/2.png", "a/2.png")]
    assert missing_files(paths) == [path for path in paths if not os.path.exists(path)]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["a.png 0", "a.png 3", "a.png -1"], r"labels in \[0, 3\).* but 2 are not: 3 of image 1 \(.*a\.png\), -1 of "),
        ([], "but it is empty"),
        (["", "  "], "but it is empty"),
        (["a.png 0", "a.png", "a.png x", "a.png 1.5", "1"], r"but 4 differ: line 2: 'a\.png', .* and 1 more"),
    ],
    ids=["label out of range", "empty", "blank", "malformed"],
)
def test_a_bad_list_is_refused_with_its_first_offenders(tmp_path, lines, sentence):
    images(tmp_path, "a.png")
    with pytest.raises(InputError, match=sentence):
        ListDataset(listed(tmp_path, *lines), str(tmp_path), num_classes=3)


def test_a_path_that_ends_with_a_number_is_looked_for_below_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "photo 12").touch()
    assert ListDataset(listed(tmp_path, "photo 12 0"), str(tmp_path / "root")).labels.tolist() == [0]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00 0\n"], ids=["missing", "not text"])
def test_a_list_that_can_not_be_read_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "absent.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"expected a list file of 'path label' lines at '.*absent\.txt', but: "):
        ListDataset(str(path))


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_a_corrupted_image_is_named(tmp_path, content):
    Image.effect_noise((40, 30), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    dataset = ListDataset(listed(tmp_path, "whole.png 0", "broken.png 0"), str(tmp_path))
    assert dataset[0]["inputs"].shape == (3, 30, 40)
    with pytest.raises(InputError, match=r"expected a whole image at '.*broken\.png', but: .*; fetch it again"):
        dataset[1]


@pytest.mark.parametrize(
    ("options", "num_classes"), [({}, 2), ({"num_classes": 4}, 4), ({"classes": ["a", "b", "c"]}, 3)]
)
def test_the_number_of_classes_is_given_or_counted(tmp_path, options, num_classes):
    images(tmp_path, "a.png")
    dataset = ListDataset(listed(tmp_path, "a.png 1"), str(tmp_path), name="mine", split="val", **options)
    assert dataset.num_classes == len(dataset.class_counts) == num_classes
    assert dataset.metainfo == {"dataset": "mine", "split": "val", "classes": options.get("classes")}


def test_class_names_that_are_too_few_are_refused(tmp_path):
    images(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"expected 3 class names in .*, got 1"):
        ListDataset(listed(tmp_path, "a.png 1"), str(tmp_path), num_classes=3, classes=["a"])


@pytest.mark.parametrize("style", ["train", "data_256"])
def test_the_public_places_lt_list_has_the_bundled_counts(tmp_path, style):
    folder = os.environ.get("DISALIGN_SHARED_DATA")
    if not folder:
        pytest.skip("DISALIGN_SHARED_DATA names no folder with the public lists")
    lists = [path for path in Path(folder).rglob("*.txt") if re.search("places.*train", path.name, re.IGNORECASE)]
    fitting = [path for path in lists if path.read_text().startswith(f"{style}/")]
    if not fitting:
        pytest.skip(f"no Places-LT training list with {style}/ paths in {folder}")
    images(tmp_path, "image.png")
    rewrite = [rf"^{style}/.*", "image.png"]
    dataset = ListDataset(str(fitting[0]), str(tmp_path), rewrite=rewrite, num_classes=365)
    assert len(dataset) == 62_500
    assert torch.equal(dataset.class_counts, load_class_counts("places_lt"))


# ------------------------------------------------------------------------------------------------------ folders


def test_folders_are_classes_in_alphabetical_order(tmp_path):
    images(tmp_path, "zebra/1.png", "ant/2.PNG", "ant/deeper/1.png")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "notes.png").write_text("in no class")
    dataset = FolderDataset(str(tmp_path))
    assert dataset.metainfo["classes"] == ["ant", "zebra"]
    assert [os.path.relpath(path, tmp_path) for path in dataset.images] == [
        "ant/2.PNG",
        "ant/deeper/1.png",
        "zebra/1.png",
    ]
    assert dataset.labels.tolist() == [0, 0, 1]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"expected a folder with one folder per class at '.*/none', but there is none"
    ):
        FolderDataset(str(tmp_path / "none"))
    (tmp_path / "ant").mkdir()
    with pytest.raises(InputError, match=r"expected images in .*, got none"):
        FolderDataset(str(tmp_path))


def test_training_counting_and_prediction_read_the_same_files(tmp_path):
    count_classes = pytest.importorskip("disalign_tools.count_classes")
    images(tmp_path / "elsewhere", "9.png", "deep/8.jpg")
    root = tmp_path / "root"
    images(root, "ant/1.png", "ant/._1.png", "ant/.cache/1.png", "ant/b/2.PNG", "bee/1.webp", ".trash/1.png")
    (root / "bee/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "ant/0.png").symlink_to(tmp_path / "elsewhere/9.png")
    (root / "bee/notes.gif").write_text("no image")
    dataset = FolderDataset(str(root))
    assert [os.path.relpath(path, root) for path in dataset.images] == [
        "ant/0.png",
        "ant/1.png",
        "ant/b/2.PNG",
        "bee/1.webp",
        "bee/linked/9.png",
        "bee/linked/deep/8.jpg",
    ]
    assert find_images([str(root)]) == dataset.images
    assert find_images([str(root / "bee"), str(root / "ant/1.png")]) == [*dataset.images[3:], dataset.images[1]]
    assert count_classes.count([str(root)], "folder")["train_counts"] == dataset.class_counts.tolist() == [3, 3]


# ------------------------------------------------------------------------------------------------------- arrays


def array_file(path, **changes):
    arrays = {
        "train_images": np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3),
        "train_labels": np.array([1, 0]),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_arrays_give_their_images_unchanged(tmp_path):
    dataset = ArrayDataset(array_file(tmp_path / "a.npz", class_names=np.array(["cat", "dog"])))
    assert dataset.metainfo["classes"] == ["cat", "dog"]
    assert dataset.labels.tolist() == [1, 0]
    expected = torch.arange(120, dtype=torch.uint8).view(2, 5, 4, 3)[1].permute(2, 0, 1)
    assert torch.equal(dataset[1]["inputs"], expected)


def test_grey_arrays_give_one_channel(tmp_path):
    grey = np.arange(40, dtype=np.uint8).reshape(2, 5, 4)
    dataset = ArrayDataset(array_file(tmp_path / "a.npz", train_images=grey))
    assert torch.equal(dataset[1]["inputs"], torch.from_numpy(grey[1:]))


def test_the_split_chooses_the_arrays(tmp_path):
    path = array_file(tmp_path / "a.npz", test_images=np.zeros((1, 5, 4), np.uint8), test_labels=np.array([3]))
    dataset = ArrayDataset(path, split="test")
    assert dataset.labels.tolist() == [3]
    assert dataset.metainfo["split"] == "test"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_images": np.zeros((2, 5, 4, 3))}, r"expected uint8 images .* got float64 \(2, 5, 4, 3\)"),
        ({"train_images": np.zeros((2, 3, 5, 4), np.uint8)}, r"expected uint8 images .* got uint8 \(2, 3, 5, 4\)"),
        ({"train_images": np.zeros((2, 60), np.uint8)}, r"expected uint8 images .* got uint8 \(2, 60\)"),
        ({"train_labels": np.array([1])}, r"N whole labels in .*, got .* int64 \(1,\)"),
        ({"train_labels": np.array([[1], [0]])}, r"N whole labels in .*, got .* int64 \(2, 1\)"),
        ({"train_labels": np.array([1.5, 0.0])}, r"N whole labels in .*, got .* float64 \(2,\)"),
        ({"train_labels": np.array([2, -1])}, r"expected labels in \[0, 3\).* but 1 are not: -1 of image 1"),
        ({"train_labels": None}, "expected 'train_images' and 'train_labels' in .*, but: train_labels"),
        ({"train_labels": np.array([1, None])}, "expected 'train_images' .* allow_pickle=False"),
        (
            {"train_images": np.zeros((0, 5, 4), np.uint8), "train_labels": np.zeros(0, np.int64)},
            "expected images in .*, got none",
        ),
    ],
    ids=["dtype", "channels first", "flat", "too few", "labels 2d", "fractions", "range", "missing", "object", "empty"],
)
def test_bad_arrays_are_refused(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        ArrayDataset(array_file(tmp_path / "a.npz", **changes))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    whole = Path(array_file(tmp_path / "whole.npz")).read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme", "text")
    for name in ("truncated.npz", "text.npz", "one.npy", "other.npz", "absent.npz"):
        with pytest.raises(InputError, match=rf"expected 'train_images' and 'train_labels' in '.*{name}', but: "):
            ArrayDataset(str(tmp_path / name))


# ------------------------------------------------------------------------------------------------------- digits

SEEDS = range(4)


def contents(dataset):
    return [image.tobytes() for image in dataset.images]


@pytest.mark.parametrize("seed", SEEDS)
def test_digits_have_the_long_tailed_profile_and_a_balanced_test(seed):
    train, test = DigitsLT(seed=seed), DigitsLT("test", seed=seed)
    assert sorted(train.class_counts.tolist(), reverse=True) == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]
    assert len(train) == 242
    assert test.class_counts.tolist() == [50] * 10
    assert train.metainfo["split"] == "train"
    assert test.metainfo["split"] == "test"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_test_digit_is_in_training(seed):
    # scikit-learn's 1,797 images are all different, so equal content would mean the same image.
    assert len({image.tobytes() for image in load_digits().images}) == 1797
    train, test = contents(DigitsLT(seed=seed)), contents(DigitsLT("test", seed=seed))
    assert len(set(train)) == 242
    assert len(set(test)) == 500
    assert not set(train) & set(test)


def test_digits_are_scikit_learns_with_their_labels():
    digits = load_digits()
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    dataset = DigitsLT(seed=1)
    for image, label in zip(dataset.images, dataset.labels.tolist(), strict=True):
        assert known[(image / 255 * 16).round().tobytes()] == label
    assert dataset[0]["inputs"].shape == (1, 8, 8)
    assert dataset.images.max() == 255


def test_the_seed_permutes_which_digit_is_rare():
    counts = [tuple(DigitsLT(seed=seed).class_counts.tolist()) for seed in SEEDS]
    assert len(set(counts)) == len(SEEDS)
    assert contents(DigitsLT(seed=2)) == contents(DigitsLT(seed=2))


def test_digits_have_no_other_split():
    with pytest.raises(InputError, match="expected split 'train', 'test' or 'balanced' of the digits, got 'val'"):
        DigitsLT("val")


# --------------------------------------------------------------------------------------------------- transforms


def test_transforms_are_torchvisions_by_name():
    steps = [dict(type="Resize", size=8), dict(type="CenterCrop", size=4)]
    image = build_transforms(steps)(Image.new("RGB", (20, 10), (1, 2, 3)))
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4))
    assert steps == [dict(type="Resize", size=8), dict(type="CenterCrop", size=4)]  # as they came


@pytest.mark.parametrize(
    "step", [dict(type="Resise"), dict(size=3), dict(type="Resize", sise=3), dict(type="RandomCrop", size=(1, 2, 3))]
)
def test_an_unknown_transform_or_option_is_refused(step):
    with pytest.raises(InputError, match=r"expected torchvision\.transforms\.v2 and its options, got \{"):
        build_transforms([step])


def test_folders_are_numbered_by_the_classes_given_and_no_others_may_be_there(tmp_path):
    images(tmp_path, "b/1.png", "c/2.png")
    assert FolderDataset(str(tmp_path), classes=["a", "b", "c"]).labels.tolist() == [1, 2]
    with pytest.raises(InputError, match=r"expected only folders named in classes in .*, got c"):
        FolderDataset(str(tmp_path), classes=["a", "b"])


# ------------------------------------------------------------------------------------------------- JSON, huge, odd


def inaturalist(root):
    images(root, "a/1.png", "b/2.png", "b/3.png")
    content = {
        "images": [
            {"id": number, "file_name": name} for number, name in ((30, "b/3.png"), (10, "a/1.png"), (20, "b/2.png"))
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7},
            {"id": 2, "image_id": 20, "category_id": 5},
            {"id": 3, "image_id": 30, "category_id": 7},
        ],
        "categories": [{"id": 7, "name": "owl"}, {"id": 6}, {"id": 5, "name": "bat"}],
    }
    path = root / "train2018.json"
    path.write_text(json.dumps(content))
    return path, content


def test_inaturalists_json(tmp_path):
    path, _ = inaturalist(tmp_path)
    dataset = JsonDataset(str(path), str(tmp_path))
    assert dataset.metainfo["classes"] == ["bat", "6", "owl"]
    assert dataset.labels.tolist() == [2, 2, 0]
    assert dataset.class_counts.tolist() == [1, 0, 2]
    assert [os.path.relpath(name, tmp_path) for name in dataset.images] == ["b/3.png", "a/1.png", "b/2.png"]
    assert dataset[2]["data_samples"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["annotations"].pop(),
            "expected one annotation of each image .* but 1 have none or several: b/3.png",
        ),
        (lambda c: c["annotations"].append({"image_id": 10, "category_id": 5}), "1 have none or several: a/1.png"),
        (lambda c: c["annotations"][0].update(category_id=9), "have another category_id: 9"),
        (lambda c: c["images"][0].pop("file_name"), "got no file_name in entry 0"),
        (lambda c: c.pop("categories"), "got no 'categories'"),
    ],
)
def test_another_json_is_refused(change, sentence, tmp_path):
    path, content = inaturalist(tmp_path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=sentence):
        JsonDataset(str(path), str(tmp_path))


def test_a_folder_of_16_bit_images_keeps_their_upper_8(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    (tmp_path / "a").mkdir()
    Image.fromarray(ramp).save(tmp_path / "a" / "1.png")
    opened = np.asarray(FolderDataset(str(tmp_path)).open(0))
    assert np.array_equal(opened, np.repeat((ramp >> 8)[..., None], 3, 2))


def test_a_label_of_billions_takes_no_memory(tmp_path):
    images(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"expected labels in \[0, 1000000\) in .*: 3000000000 of image 0"):
        ListDataset(listed(tmp_path, "a.png 3000000000"), str(tmp_path))


def test_a_small_npz_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("train_images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (300_000, 32, 32)})
        for _ in range(300):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"train_images\.npy would unpack \d+ bytes to \d+; make it again"):
        ArrayDataset(str(path))
