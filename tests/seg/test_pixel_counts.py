"""Pixels per class: against numpy loops over the generated masks, through every way a dataset loads them."""

import json
import os
import re

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations as BaseLoadAnnotations
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.registry import TRANSFORMS

from disalign import InputError, load_class_counts
from disalign_mmseg import pixel_counts
from disalign_mmseg.annotations import guard
from disalign_mmseg.pixel_counts import CACHE, checksum, class_counts_of, count_pixels, on_main_process

from .annotated import CLASSES, dataset, put, write

K = len(CLASSES)
LABELS = (0, 1, 1, 1, 3, 255)  # never 2


def by_loops(masks, num_classes=K, shift=0):
    """Pixels and images per class, and all pixels."""
    pixels, images, total = [0] * num_classes, [0] * num_classes, 0
    for mask in masks:
        seen = set()
        for label in mask.ravel().tolist():
            total += 1
            if 0 <= label - shift < num_classes:
                pixels[label - shift] += 1
                seen.add(label - shift)
        for label in seen:
            images[label] += 1
    return pixels, images, total


@pytest.fixture
def masks(tmp_path):
    return write(tmp_path, LABELS)


def figures(record):
    return record["train_counts"], record["image_counts"], record["total_pixels"]


def test_the_record(masks, tmp_path):
    record = count_pixels(dataset(tmp_path), K)
    assert figures(record) == by_loops(masks)
    assert record["total_pixels"] == 9 * 12 + 8 * 7 + 10 * 10
    assert sum(record["train_counts"]) < record["total_pixels"]  # 255 is no class, but a pixel
    assert record["train_counts"][2] == record["image_counts"][2] == 0
    assert record["files"] == 3
    assert record["dataset"] == "BaseSegDataset"
    assert record["class_names"] == list(CLASSES)
    assert record["unit"] == "pixels"
    assert "3 annotations" in record["source"]
    (tmp_path / "counts.json").write_text(json.dumps(record))
    assert load_class_counts(tmp_path / "counts.json").tolist() == record["train_counts"]
    assert load_class_counts(tmp_path / "counts.json", unit="images").tolist() == record["image_counts"]


def test_reduce_zero_label_shifts_and_ignores_zero(tmp_path):
    masks = write(tmp_path, (0, 1, 2, 4, 255))
    record = count_pixels(dataset(tmp_path, reduce_zero_label=True), K)
    assert figures(record) == by_loops(masks, shift=1)


class FourClasses(BaseSegDataset):
    METAINFO = dict(classes=("sky", "road", "car", "bird"), palette=[[0, 0, 0]] * 4)


def test_the_label_map_of_chosen_classes(masks, tmp_path):
    chosen = dataset(tmp_path, type=FourClasses, classes=("bird", "sky"))
    mapped = [np.select([mask == 3, mask == 0], [0, 1], 255) for mask in masks]
    assert figures(count_pixels(chosen, 2)) == by_loops(mapped, 2)


@TRANSFORMS.register_module()
class LoadInverted(BaseLoadAnnotations):
    """A user's own loader."""

    def __init__(self):
        super().__init__(with_bbox=False, with_label=False, with_seg=True)

    def transform(self, results):
        super()._load_seg_map(results)
        labels = results["gt_seg_map"].astype(np.int64)
        results["gt_seg_map"] = np.where(labels == 255, 255, 3 - labels)
        return results


def test_a_loader_of_the_users_own(masks, tmp_path):
    own = dataset(tmp_path, pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadInverted")])
    inverted = [np.where(mask == 255, 255, 3 - mask.astype(int)) for mask in masks]
    assert figures(count_pixels(own, K)) == by_loops(inverted)


def test_augmentation_and_the_images_are_left_out(masks, tmp_path):
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"not read")
    steps = [
        dict(type="LoadImageFromFile"),
        dict(type="RandomResize", scale=(40, 20), ratio_range=(0.5, 2.0)),
        dict(type="LoadAnnotations"),
        dict(type="RandomCrop", crop_size=(2, 2)),
    ]
    assert figures(count_pixels(dataset(tmp_path, pipeline=steps), K)) == by_loops(masks)


def test_another_ignored_label(masks, tmp_path):
    for mask, name in zip(masks, "abc", strict=True):
        put(tmp_path, f"{name}.png", np.where(mask == 255, 0, mask).astype(np.uint8))
    pixels, images, total = figures(count_pixels(dataset(tmp_path), K, ignore_index=1))
    expected = by_loops([np.where(np.isin(mask, (1,)), 255, np.where(mask == 255, 0, mask)) for mask in masks])
    assert (pixels, images, total) == expected
    assert pixels[1] == images[1] == 0


class WithCategories(BaseSegDataset):
    """A dataset that ClassBalancedDataset can ask; the second image is repeated."""

    def get_cat_ids(self, index):
        return [3] if index == 1 else [0]


def test_wrappers_count_each_image_once(masks, tmp_path):
    expected = by_loops(masks)
    plain = dataset(tmp_path)
    balanced = ClassBalancedDataset(dataset(tmp_path, type=WithCategories), oversample_thr=1.0)
    assert len(balanced) > 3
    assert figures(count_pixels(RepeatDataset(plain, 5), K)) == expected
    assert figures(count_pixels(balanced, K)) == expected


def test_every_listed_dataset_counts(masks, tmp_path):
    other = write(tmp_path / "other", (0, 2), sizes=((5, 5),), names="x")
    parts = ConcatDataset([dataset(tmp_path), RepeatDataset(dataset(tmp_path / "other"), 2).dataset])
    expected = by_loops([*masks, *other])
    assert figures(count_pixels(parts, K)) == expected
    mixed = MultiImageMixDataset(parts, [dict(type="RandomMosaic", prob=1.0, img_scale=(8, 8))])
    record = count_pixels(mixed, K)
    assert figures(record) == expected
    assert record["files"] == 4


def test_a_subset_counts_its_own_images(masks, tmp_path):
    assert figures(count_pixels(dataset(tmp_path, indices=[0, 2]), K)) == by_loops([masks[0], masks[2]])


def test_many_masks_by_processes(tmp_path, monkeypatch):
    names = [f"{number:03d}" for number in range(60)]
    masks = write(tmp_path, LABELS, sizes=[(6, 5 + number % 3) for number in range(60)], names=names)
    many = dataset(tmp_path, serialize_data=True)  # mmengine's default
    used = []
    real = pixel_counts.DataLoader
    monkeypatch.setattr(
        pixel_counts,
        "DataLoader",
        lambda *args, **options: used.append(options["num_workers"]) or real(*args, **options),
    )
    for workers in (0, 2):
        assert figures(count_pixels(many, K, workers=workers)) == by_loops(masks)
    assert used == [0, 2]
    put(tmp_path, "041.png", np.full((6, 5), 77, dtype=np.uint8))
    (tmp_path / "masks/007.png").unlink()
    with pytest.raises(
        InputError, match=r"^expected an annotation at '.*007\.png', .*such file \(and 1 more annotations\)$"
    ):
        count_pixels(many, K, workers=2)


def test_random_numbers_are_not_touched(masks, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    count_pixels(dataset(tmp_path), K)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# ---------------------------------------------------------------------------------------------------------- keeping


@pytest.fixture
def counted(monkeypatch):
    """How often the pixels were counted."""
    calls = []
    real = pixel_counts.count_pixels
    monkeypatch.setattr(pixel_counts, "count_pixels", lambda *args: calls.append(args) or real(*args))
    return calls


def test_counts_are_kept_and_used_again(masks, tmp_path, counted):
    run = tmp_path / "run"
    first = class_counts_of(dataset(tmp_path), K, 255, folder=run)
    assert json.loads((run / CACHE).read_text()) == first
    assert first["checksum"] == checksum(dataset(tmp_path), K)
    guarded = dataset(tmp_path)
    guard(guarded, K)
    # Read or not, guarded or not, named by a str or not.
    assert class_counts_of(guarded, K, 255, folder=str(run)) == first
    assert guarded[0] is not None
    assert class_counts_of(guarded, K, 255, folder=run) == first
    assert len(counted) == 1
    assert os.listdir(run) == [CACHE]


def touch(folder):
    os.utime(folder / "masks/b.png", ns=(1, 1))


def grow(folder):
    write(folder, LABELS, sizes=((4, 4),), names="d")


def repaint(folder):
    put(folder, "c.png", np.zeros((10, 10), dtype=np.uint8))


@pytest.mark.parametrize("change", [touch, grow, repaint])
def test_other_data_is_counted_anew(masks, tmp_path, counted, change):
    first = class_counts_of(dataset(tmp_path), K, 255, folder=tmp_path)
    change(tmp_path)
    second = class_counts_of(dataset(tmp_path), K, 255, folder=tmp_path)
    assert len(counted) == 2
    assert second["checksum"] != first["checksum"]
    assert json.loads((tmp_path / CACHE).read_text()) == second


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (dict(classes=("sky", "road", "car", "fish")), (4,)),
        (dict(reduce_zero_label=True), (4,)),
        (dict(indices=[0, 1]), (4,)),
        (dict(classes=(*CLASSES, "fish")), (5,)),
        (dict(), (5,)),
        (dict(), (4, 1)),
        (dict(type=FourClasses, classes=("bird", "sky", "road", "car")), (4,)),
        (dict(pipeline=[dict(type="LoadInverted")]), (4,)),
        (dict(pipeline=[dict(type="LoadAnnotations", imdecode_backend="cv2")]), (4,)),
    ],
    ids=str,
)
def test_the_same_files_read_otherwise_have_another_checksum(masks, tmp_path, options, arguments):
    assert checksum(dataset(tmp_path, **options), *arguments) != checksum(dataset(tmp_path), K)


def test_the_order_of_the_files_is_not_part_of_the_checksum(masks, tmp_path):
    assert checksum(dataset(tmp_path, indices=[2, 0, 1]), K) == checksum(dataset(tmp_path), K)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"train_counts": [1]', b"\xff", b"short"])
def test_a_spoilt_file_of_counts_is_replaced(masks, tmp_path, counted, content):
    record = class_counts_of(dataset(tmp_path), K, 255, folder=tmp_path)
    if content == b"short":
        content = json.dumps({**record, "train_counts": [1]}).encode()
    (tmp_path / CACHE).write_bytes(content)
    assert class_counts_of(dataset(tmp_path), K, 255, folder=tmp_path) == record
    assert json.loads((tmp_path / CACHE).read_text()) == record
    assert len(counted) == 2


def test_in_a_process_group(masks, tmp_path, process_group):
    assert figures(on_main_process(count_pixels, dataset(tmp_path), K)) == by_loops(masks)


def test_other_processes_wait_for_the_main_one(monkeypatch):
    """What they get is what is broadcast, and they call nothing themselves."""
    sent = []
    monkeypatch.setattr(pixel_counts, "is_main_process", lambda: False)
    monkeypatch.setattr(pixel_counts, "broadcast_object_list", lambda box: box.__setitem__(slice(None), sent))
    sent[:] = [{"train_counts": [1]}]
    assert on_main_process(pytest.fail, "called") == {"train_counts": [1]}
    sent[:] = [InputError("expected this, got that")]
    with pytest.raises(InputError, match=r"^expected this, got that$"):
        on_main_process(pytest.fail, "called")


def test_the_main_process_sends_its_refusal_before_it_raises(monkeypatch):
    sent = []
    monkeypatch.setattr(pixel_counts, "broadcast_object_list", sent.extend)

    def refuse():
        raise InputError("expected this, got that")

    with pytest.raises(InputError, match=r"^expected this, got that$") as caught:
        on_main_process(refuse)
    assert sent == [caught.value]


# --------------------------------------------------------------------------------------------------------- refusals


def refused(tmp_path, **options):
    """The sentence; nothing is kept."""
    with pytest.raises(InputError) as caught:
        class_counts_of(dataset(tmp_path, **options), K, 255, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_labels_out_of_range_are_named_with_file_number_and_place(masks, tmp_path):
    wrong = masks[1].copy()
    wrong[3, 5] = wrong[4, 0] = 4
    wrong[6, 2] = 200
    put(tmp_path, "b.png", wrong)
    path = str(tmp_path / "masks/b.png")
    assert refused(tmp_path) == (
        f"expected labels 0..3, or 255 for ignored pixels, in {path!r}, but 3 pixels are not: 2 are 4, 1 are 200, the "
        "first at x 5, y 3; correct the annotation, or the classes"
    )
    write(tmp_path, (1, 2, 3))
    put(tmp_path, "b.png", np.full((8, 7), 9, dtype=np.uint8))
    assert "56 are 8 (as loaded: reduce_zero_label takes 1 off), the first at x 0, y 0" in refused(
        tmp_path, reduce_zero_label=True
    )


def test_an_ignored_label_of_another_number_is_out_of_range(masks, tmp_path):
    with pytest.raises(
        InputError, match=r"labels 0\.\.3, or 254 for ignored pixels, in .*a\.png', but \d+ .* are 255,"
    ):
        count_pixels(dataset(tmp_path), K, ignore_index=254)


def test_missing_and_broken_annotations(masks, tmp_path):
    path = tmp_path / "masks/c.png"
    content = path.read_bytes()
    path.unlink()
    assert refused(tmp_path) == f"expected an annotation at {str(path)!r}, but there is no such file"
    for broken in (b"", content[:60], b"no image"):
        path.write_bytes(broken)
        assert re.match(
            rf"expected an annotation that can be read at {str(path)!r}, but: .+; is it whole\?", refused(tmp_path)
        )
    put(tmp_path, "c.png", np.zeros((10, 10, 3), dtype=np.uint8))
    assert f"shape (10, 10), in {str(path)!r}, got (10, 10, 3); is it a grey-scale image" in refused(tmp_path)


def test_pipelines_and_datasets_that_cannot_be_counted(masks, tmp_path):
    sentence = refused(tmp_path, pipeline=[dict(type="LoadImageFromFile"), dict(type="PackSegInputs")])
    assert sentence == "expected LoadAnnotations in the pipeline of BaseSegDataset, got none; add it"
    with pytest.raises(InputError, match=r"got TensorDataset; give class counts as a JSON file"):
        count_pixels(torch.utils.data.TensorDataset(torch.zeros(1)), K)
