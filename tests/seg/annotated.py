"""Generated images and annotations on disk, and datasets over them."""

import numpy as np
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from PIL import Image

register_all_modules(init_default_scope=False)

CLASSES = ("sky", "road", "car", "bird")
PIPELINE = (dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs"))


def write(folder, labels, sizes=((9, 12), (8, 7), (10, 10)), names="abc"):
    """Images and annotations with pixels drawn from ``labels``; returns the masks."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    masks = [rng.choice(labels, size).astype(np.uint8) for size in sizes]
    for name, mask in zip(names, masks, strict=True):
        image = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return masks


def config(folder, classes=CLASSES, pipeline=PIPELINE, **options):
    return dict(
        type=options.pop("type", "BaseSegDataset"),
        data_root=str(folder),
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=classes),
        pipeline=list(pipeline),
        serialize_data=options.pop("serialize_data", False),  # it collects garbage: half a second each
        **options,
    )


def dataset(folder, **options):
    return DATASETS.build(config(folder, **options))


def put(folder, name, labels, **options):
    Image.fromarray(np.asarray(labels)).save(folder / "masks" / name, **options)
