"""What is wrong with a dataset is said before training, and what only training meets is said with the file's name."""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import numpy as np
from mmengine.dataset import Compose, ConcatDataset, RepeatDataset
from mmseg.datasets import BaseSegDataset, LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image
from torch.utils.data import DataLoader

from disalign import InputError, load_class_counts
from disalign.cli import sentence_of
from disalign_mmseg import check
from disalign_mmseg.annotations import Guarded, guard
from disalign_mmseg.data_check import build_dataset, check_dataset, dataset_problems
from disalign_mmseg.pixel_counts import count_pixels

from .annotated import CLASSES, PIPELINE, config, dataset, put, write

K = len(CLASSES)
AUGMENTED = (
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(20, 10), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(6, 6)),
    dict(type="PackSegInputs"),
)
# Evaluation loads the annotation after it has resized the image.
RESIZED = (PIPELINE[0], dict(type="Resize", scale=(20, 10), keep_ratio=True), *PIPELINE[1:])


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, (0, 1, 2, 3, 255))
    return tmp_path


def only(problems):
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    return problems[0]


def spoil_label(folder):
    put(folder, "b.png", np.pad(np.full((1, 1), 200, dtype=np.uint8), ((2, 5), (4, 2))))
    return f"in {str(folder / 'masks/b.png')!r}, but 1 pixels are not: 1 are 200, the first at x 4, y 2; correct the"


def spoil_size(folder):
    put(folder, "b.png", np.zeros((7, 8), dtype=np.uint8))
    path, image = str(folder / "masks/b.png"), str(folder / "images/b.jpg")
    return (
        f"expected one label per pixel, an array of shape (8, 7), in {path!r}, got (7, 8); is it a grey-scale image, "
        f"and that of {image!r}?"
    )


def spoil_colour(folder):
    put(folder, "b.png", np.zeros((8, 7, 3), dtype=np.uint8))
    path = str(folder / "masks/b.png")
    return f"expected one label per pixel, an array of shape (8, 7), in {path!r}, got (8, 7, 3); is it a grey-scale"


def spoil_annotation(folder):
    (folder / "masks/b.png").write_bytes(b"no image")
    return f"expected an annotation that can be read at {str(folder / 'masks/b.png')!r}, but: "


def spoil_image(folder):
    (folder / "images/b.jpg").write_bytes(b"no image")
    return f"expected an image that can be read at {str(folder / 'images/b.jpg')!r}, but: "


def truncate_annotation(folder):
    path = folder / "masks/b.png"
    put(folder, "b.png", np.random.default_rng(0).integers(0, 4, (8, 7), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:48])  # the header is whole
    return f"expected an annotation that can be read at {str(path)!r}, but: "


SPOILT = [spoil_label, spoil_size, spoil_colour, spoil_annotation, spoil_image, truncate_annotation]


# -------------------------------------------------------------------------------------------------- before training


@pytest.mark.parametrize("pipeline", [PIPELINE, AUGMENTED, RESIZED], ids=["plain", "augmented", "resized"])
def test_nothing_to_say_of_whole_data(folder, pipeline):
    whole = dataset(folder, pipeline=pipeline)
    assert dataset_problems(whole, K) == dataset_problems(whole, K, labels=None) == []
    check_dataset(whole, K)
    check_dataset(ConcatDataset([whole, dataset(folder)]), K)


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: RepeatDataset(one, 4)], ids=["plain", "repeated"])
def test_what_is_spoilt_is_said(folder, spoil, wrap):
    expected = spoil(folder)
    assert expected in only(dataset_problems(wrap(dataset(folder, pipeline=RESIZED)), K))
    with pytest.raises(InputError, match=re.escape(expected)):
        check_dataset(wrap(dataset(folder)), K)


def test_missing_annotations_are_counted_and_named(folder):
    (folder / "masks/c.png").unlink()
    (folder / "masks/a.png").unlink()
    problem = only(dataset_problems(dataset(folder), K))
    names = ", ".join(str(folder / "masks" / name) for name in ("a.png", "c.png"))
    assert problem == f"expected 3 annotations of BaseSegDataset, but 2 are missing: {names}"


def test_a_list_of_images_may_name_missing_ones(folder):
    (folder / "list.txt").write_text("a\nx\n")
    problems = dataset_problems(dataset(folder, ann_file="list.txt"), K)
    assert problems == [
        f"expected 2 images of BaseSegDataset, but 1 are missing: {folder / 'images/x.jpg'}",
        f"expected 2 annotations of BaseSegDataset, but 1 are missing: {folder / 'masks/x.png'}",
    ]
    with pytest.raises(InputError, match=r"x\.jpg \(and 1 more, see python -m disalign_mmseg\.check\)$"):
        check_dataset(dataset(folder, ann_file="list.txt"), K)


def test_the_number_of_classes(folder):
    expected = "expected num_classes=4 in the decode head, the number of classes of BaseSegDataset, got 150"
    assert only(dataset_problems(dataset(folder), 150)) == expected
    assert "got 3" in only(dataset_problems(dataset(folder), 3)[:1])


def test_images_without_annotations_are_enough_for_prediction(folder):
    for path in (folder / "masks").iterdir():
        path.unlink()
    assert dataset_problems(dataset(folder, pipeline=[PIPELINE[0]]), K) == []


def test_labels_are_read_in_a_sample_spread_over_the_dataset(tmp_path):
    write(tmp_path, (0, 9), sizes=[(5, 5)] * 9, names="abcdefghi")
    many = dataset(tmp_path)
    found = [re.search(r"masks/(.)\.png", problem)[1] for problem in dataset_problems(many, K, labels=3)]
    assert found == ["a", "e", "i"]
    assert len(dataset_problems(many, K, labels=None)) == 9
    assert dataset_problems(many, K, labels=0) == []


def test_all_that_look_wrong_are_loaded_only_if_asked_for(tmp_path):
    write(tmp_path, (0, 1), sizes=[(5, 5)] * 6, names="abcdef")
    for name in "abcdef":
        put(tmp_path, f"{name}.png", np.zeros((5, 6), dtype=np.uint8))
    assert len(dataset_problems(dataset(tmp_path), K, labels=2)) == 2
    assert len(dataset_problems(dataset(tmp_path), K, labels=None)) == 6


def test_labels_of_sixteen_bits_that_would_become_others(folder):
    labels = np.zeros((8, 7), dtype=np.uint16)
    put(folder, "b.png", labels)
    assert dataset_problems(dataset(folder), K) == []
    labels[3, 2] = 258  # 2 in 8 bits
    put(folder, "b.png", labels)
    path = str(folder / "masks/b.png")
    assert only(dataset_problems(dataset(folder), K)) == (
        f"expected labels 0..255, or 255 for ignored pixels, in {path!r}, but 1 pixels are not: 1 are 258 "
        "(MMSegmentation reads 8 bits), the first at x 2, y 3; correct the annotation, or the classes"
    )


def test_a_photograph_turned_by_its_tag_is_no_other_size(folder):
    """The framework turns the image as the tag says, so the annotation of the turned one is right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 7, 3), dtype=np.uint8)).save(folder / "images/b.jpg", exif=exif)
    assert "shape (7, 8), in" in only(dataset_problems(dataset(folder), K))
    put(folder, "b.png", np.zeros((7, 8), dtype=np.uint8))
    assert dataset_problems(dataset(folder), K) == []


# --------------------------------------------------------------------------------------------------------- building


def test_a_dataset_is_built(folder):
    built = build_dataset(dict(type="RepeatDataset", times=2, dataset=config(folder)))
    assert len(built) == 6


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: one,
        lambda one: dict(type="RepeatDataset", times=2, dataset=one),
        lambda one: dict(type="ConcatDataset", datasets=[one, one]),
    ],
    ids=["plain", "repeated", "concatenated"],
)
def test_missing_folders_and_empty_ones(folder, wrap):
    with pytest.raises(
        InputError,
        match=r"^expected images \(\*\.jpg\) of BaseSegDataset in '.*no/images', but there is no such folder",
    ):
        build_dataset(wrap(config(folder / "no")))
    with pytest.raises(
        InputError, match=r"^expected images \(\*\.tif\) of BaseSegDataset in '.*/images', got none; check"
    ):
        build_dataset(wrap(config(folder, img_suffix=".tif", serialize_data=True)))
    (folder / "empty.txt").write_text("")
    for name in ("no.txt", "empty.txt"):
        with pytest.raises(
            InputError,
            match=rf"^expected the list of images of BaseSegDataset in '.*/{name}', but it is missing or empty",
        ):
            build_dataset(wrap(config(folder, ann_file=name, serialize_data=True)))


def test_images_in_a_linked_folder_are_no_reason_that_a_dataset_can_not_be_built(folder, tmp_path):
    """MMSegmentation reads them, so the sentence must be about what is really wrong."""
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").mkdir()
    (folder / "images/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(dataset(folder)) == 3
    with pytest.raises(InputError, match=r"^expected a config that can be built .*NoSuchStep"):
        build_dataset(config(folder, pipeline=[dict(type="NoSuchStep")]))
    (tmp_path / "elsewhere/._x.jpg").write_text("what a Mac leaves behind")
    for name in "abc":
        (tmp_path / f"elsewhere/{name}.jpg").unlink()
    with pytest.raises(InputError, match=r"^expected images \(\*\.jpg\) of BaseSegDataset in '.*/images', got none"):
        build_dataset(config(folder, serialize_data=True))


def test_no_images_in_a_dataset_that_lets_itself_be_built(folder):
    expected = f"expected images (*.tif) of BaseSegDataset in {str(folder / 'images')!r}, got none; check data_root"
    assert expected in only(dataset_problems(dataset(folder, img_suffix=".tif"), K))
    (folder / "empty.txt").write_text("")
    expected = f"expected the list of images of BaseSegDataset in {str(folder / 'empty.txt')!r}, but it is missing or"
    assert expected in only(dataset_problems(dataset(folder, ann_file="empty.txt"), K))


class WithoutAnnotations(BaseSegDataset):
    def load_data_list(self):
        return [{"img_path": one["img_path"]} for one in super().load_data_list()]


def test_images_whose_annotations_the_dataset_does_not_name(folder):
    problem = only(dataset_problems(dataset(folder, type=WithoutAnnotations), K))
    assert problem.startswith("expected 3 annotations of WithoutAnnotations, but 3 are missing: (no seg_map_path)")


def test_configs_that_cannot_be_built(folder):
    with pytest.raises(InputError, match=r"^expected a config that can be built in 'BaseSegDataset', but: .*unknown"):
        build_dataset(config(folder, unknown=1))
    with pytest.raises(
        InputError, match=r"^expected a config that can be built in 'NoSuchDataset', but: NoSuchDataset is"
    ):
        build_dataset(config(folder, type="NoSuchDataset"))
    with pytest.raises(InputError, match=r"expected a config that can be built in 'BaseSegDataset', but: .*NoSuchStep"):
        build_dataset(config(folder, pipeline=[dict(type="NoSuchStep")]))


# -------------------------------------------------------------------------------------------------- during training


@pytest.mark.parametrize("pipeline", [PIPELINE, AUGMENTED, RESIZED], ids=["plain", "augmented", "resized"])
def test_a_guard_changes_nothing_of_whole_data(folder, pipeline):
    plain, guarded = dataset(folder, pipeline=pipeline), dataset(folder, pipeline=pipeline)
    guard(RepeatDataset(guarded, 2), K)
    assert sum(isinstance(one, Guarded) for one in guarded.pipeline.transforms) == 2
    assert repr(guarded.pipeline) == repr(plain.pipeline)
    for index in range(3):
        np.random.seed(index)
        expected = plain[index]
        np.random.seed(index)
        found = guarded[index]
        assert (found["inputs"] == expected["inputs"]).all()
        assert (found["data_samples"].gt_sem_seg.data == expected["data_samples"].gt_sem_seg.data).all()


def test_a_second_guard_adds_nothing(folder):
    guarded = dataset(folder)
    guard(guarded, K)
    guard(guarded, K)
    assert not any(isinstance(getattr(one, "loader", None), Guarded) for one in guarded.pipeline.transforms)


@pytest.mark.parametrize("pipeline", [PIPELINE, AUGMENTED, RESIZED], ids=["plain", "augmented", "resized"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_what_training_meets_is_one_sentence(folder, spoil, pipeline):
    guarded = dataset(folder, pipeline=pipeline)
    guard(guarded, K)
    expected = spoil(folder)
    with pytest.raises(InputError, match=re.escape(expected)):
        guarded[1]
    assert guarded[0] is not None


@pytest.mark.parametrize(("missing", "what"), [("images/b.jpg", "image"), ("masks/b.png", "annotation")])
def test_a_file_that_goes_missing(folder, missing, what):
    guarded = dataset(folder)
    guard(guarded, K)
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"^expected an {what} at '.*/{missing}', but there is no such file$"):
        guarded[1]


def test_the_sentence_comes_through_a_worker(folder):
    expected = spoil_label(folder)
    guarded = dataset(folder)
    guard(guarded, K)
    with pytest.raises(InputError) as caught:
        list(DataLoader(guarded, batch_size=None, num_workers=1))
    assert sentence_of(caught.value).startswith("expected labels 0..3, or 255")
    assert expected in sentence_of(caught.value)


def test_test_time_augmentation_is_guarded_too(folder):
    expected = spoil_label(folder)
    steps = [
        PIPELINE[0],
        dict(
            type="TestTimeAug",
            transforms=[
                [dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (1.0, 2.0)],
                [dict(type="LoadAnnotations")],
                [dict(type="PackSegInputs")],
            ],
        ),
    ]
    guarded = dataset(folder, pipeline=steps)
    assert guarded[1] is not None
    guard(guarded, K)
    assert len(guarded[0]["inputs"]) == 2
    with pytest.raises(InputError, match=re.escape(expected)):
        guarded[1]
    assert expected in only(dataset_problems(guarded, K))


@TRANSFORMS.register_module(force=True)
class LoadFaulty(LoadAnnotations):
    def transform(self, results):
        return results["no such key"]


@DATASETS.register_module(force=True)
class FaultyDataset(BaseSegDataset):
    def load_data_list(self):
        return [one.no_such_attribute for one in super().load_data_list()]


def test_errors_in_classes_of_ones_own_keep_their_traceback(folder):
    faulty = dataset(folder, pipeline=[PIPELINE[0], dict(type="LoadFaulty")])
    for check_it in (check_dataset, count_pixels):
        with pytest.raises(KeyError, match="no such key") as caught:
            check_it(faulty, K)
        assert "LoadFaulty.transform" in str(caught.traceback[-1].frame.code.raw.co_qualname)
        assert caught.value.__notes__ == [f"while loading {str(folder / 'masks/a.png')!r}"]
    with pytest.raises(AttributeError, match="no_such_attribute") as caught:
        build_dataset(config(folder, type="FaultyDataset"))
    assert not isinstance(caught.value, InputError)
    # A fault of the data is one sentence even so.
    with pytest.raises(InputError, match=r"^expected images .* of FaultyDataset in '.*no/images', but there is no"):
        build_dataset(config(folder / "no", type="FaultyDataset"))


def test_another_ignored_label_is_let_through(folder):
    put(folder, "a.png", np.full((9, 12), 200, dtype=np.uint8))
    guarded = dataset(folder)
    guard(guarded, K, ignore_index=200)
    assert guarded[0] is not None
    with pytest.raises(InputError, match=r"labels 0\.\.3, or 200 for ignored pixels, in .*b\.png"):
        guarded[1]


def test_an_annotation_of_ignored_pixels_alone_is_fine(folder):
    put(folder, "a.png", np.full((9, 12), 255, dtype=np.uint8))
    guarded = dataset(folder)
    guard(guarded, K)
    assert guarded[0] is not None
    assert dataset_problems(guarded, K) == []


def test_an_image_that_may_be_empty_stays_so(folder):
    loader = Guarded(Compose([dict(type="LoadImageFromFile", ignore_empty=True)]).transforms[0], K, 255)
    assert loader({"img_path": str(folder / "no.jpg")}) is None


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def written(folder, tmp_path):
    """A config over the folder, as a file."""
    steps = [dict(one) for one in PIPELINE]
    text = f"data = {dict(dataset=config(folder, pipeline=steps))!r}\n"
    text += "train_dataloader = data\nval_dataloader = data\ntest_dataloader = data\n"
    text += "model = dict(type='EncoderDecoder', decode_head=dict(type='FCNHead', num_classes=4))\n"
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_the_command_on_whole_data(written, tmp_path, capsys):
    out = tmp_path / "new" / "counts.json"
    assert check.main([written, "--counts", str(out)]) == 0
    output = capsys.readouterr().out
    for name in ("train", "val", "test"):
        assert f"{name}_dataloader: 3 images of 4 classes\n" in output
    assert f"{out}: 264 pixels in 3 annotations; head 4, body 0, tail 0 classes\n" in output
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / "masks").iterdir()]
    expected = [sum(int((mask == label).sum()) for mask in masks) for label in range(K)]
    assert load_class_counts(out).tolist() == expected
    assert json.loads(out.read_text())["total_pixels"] == 264


def test_a_class_without_a_pixel_is_named(written, tmp_path, capsys):
    write(tmp_path, (0, 1, 3))
    assert check.main([written, "--counts", str(tmp_path / "counts.json")]) == 0
    assert "; no pixel of car\n" in capsys.readouterr().out


def test_the_command_on_spoilt_data(written, tmp_path, capsys, monkeypatch):
    expected = spoil_label(tmp_path)
    for options in ([], ["--counts", str(tmp_path / "counts.json")], ["--quick"]):
        assert check.main([written, *options]) == 2
        captured = capsys.readouterr()
        assert captured.out.count(expected) == 3
        assert captured.err.splitlines()[-1] == "error: expected whole data, but 3 of its sets can't be used, see above"
    assert not (tmp_path / "counts.json").exists()
    # The sample of --quick may miss it: the first, and no other.
    monkeypatch.setattr(check, "SAMPLE", 1)
    assert check.main([written, "--quick"]) == 0
    assert check.main([written]) == 2


def test_long_lists_are_cut_short_unless_asked_for(written, tmp_path, capsys):
    names = [f"x{number:02d}" for number in range(12)]
    write(tmp_path, (9,), sizes=[(5, 5)] * 12, names=names)
    assert check.main([written]) == 2
    output = capsys.readouterr().out
    assert output.count("train_dataloader: expected labels") == 10
    assert "train_dataloader: and 2 more, see --all" in output
    assert check.main([written, "--all"]) == 2
    assert capsys.readouterr().out.count("train_dataloader: expected labels") == 12


def test_the_number_of_classes_is_the_heads(written, capsys):
    assert check.main([written, "--cfg-options", "model.decode_head.num_classes=5"]) == 2
    assert "expected num_classes=4 in the decode head" in capsys.readouterr().out


def test_a_cascades_last_head_counts(written, tmp_path):
    cascade = tmp_path / "cascade.py"
    cascade.write_text(
        Path(written).read_text() + "model['decode_head'] = [dict(num_classes=2), dict(num_classes=4)]\n"
    )
    assert check.main([str(cascade)]) == 0


def test_other_sets_than_the_training_set_may_be_missing(written, capsys):
    assert check.main([written, "--cfg-options", "val_dataloader=None", "test_dataloader=None"]) == 0
    assert "val_dataloader: none\ntest_dataloader: none\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workers", "-1"], "expected 0 or more as --workers, got -1"),
        (["--counts", "counts.txt"], "expected the name of a .json file as --counts, got 'counts.txt'"),
        (["--cfg-options", "nonsense.key=1"], "expected --cfg-options of keys that the config has, got nonsense"),
        (["--cfg-options", "model.decode_head=None"], "expected a config that can be built"),
        (["--cfg-options", "train_dataloader=None"], "expected whole data, but 1 of its sets"),
    ],
)
def test_refused_arguments(written, capsys, options, sentence):
    assert check.main([written, *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_foreground_saved_as_the_ignored_label_is_said(tmp_path):
    write(tmp_path, [0, 255])
    sentence = only(dataset_problems(dataset(tmp_path), 4, labels=None))
    assert sentence.startswith("expected pixels of 2 or more of 4 classes in 3 annotations, got 0 and ")
    assert sentence.endswith(" pixels of 255, which is ignored; if that is the foreground, save it as 1")
    assert dataset_problems(dataset(tmp_path), 4, labels=2) == []  # the foreground may be in the others


def test_masks_of_nothing_but_ignored_pixels_are_said(tmp_path):
    write(tmp_path, [255])
    for labels in (None, 2):
        sentence = only(dataset_problems(dataset(tmp_path), 4, labels=labels))
        assert re.search(r"pixels of \d or more of 4 classes in \d annotations, got none and", sentence)
    with pytest.raises(InputError, match="in 3 annotations, got none and 264 pixels of 255, which is ignored"):
        check_dataset(dataset(tmp_path), 4)


@pytest.mark.parametrize(("kind", "what"), [("images/a.jpg", "an image"), ("masks/a.png", "an annotation")])
def test_a_pipe_is_not_waited_for(kind, what, folder):
    found = dataset(folder)
    guard(found, 4)
    os.remove(folder / kind)
    os.mkfifo(folder / kind)
    with pytest.raises(
        InputError, match=rf"expected {what} in a file, got '.*', a device or a pipe; save it to a file"
    ):
        found[0]
