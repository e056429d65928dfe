"""Small datasets in LVIS and COCO format for the tests."""

import itertools
import json

import numpy as np
from PIL import Image

_numbers = itertools.count()

#: Width and height of all images.
SIZE = (32, 24)


def unique(name="set"):
    """A name that no other test has: Detectron2's catalogs are global."""
    return f"{name}_{next(_numbers)}"


def box(id_, image, category, x=2, y=3, w=10, h=8, **more):
    """An annotation with a rectangle as its polygon."""
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry = {"id": id_, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
    return {**entry, "segmentation": [polygon], **more}


def coco():
    """Three classes with gaps between the ids, out of order, on the images 3, 5 and 9.

    Instances: ant 1, cat 3, dog 1 and a crowd; images: ant 1, cat 2, dog 1.
    """
    width, height = SIZE
    return {
        "categories": [{"id": 40, "name": "dog"}, {"id": 2, "name": "ant"}, {"id": 7, "name": "cat"}],
        "images": [
            {"id": id_, "file_name": f"{id_}.png", "width": width, "height": height, "license": 1} for id_ in (5, 3, 9)
        ],
        "annotations": [
            box(11, 3, 7),
            box(12, 5, 7, x=5),
            box(13, 3, 2, y=1),
            box(14, 3, 7, w=20),
            box(15, 9, 40),
            box(16, 5, 40, iscrowd=1),
        ],
    }


def lvis(classes=3, split="train2017"):
    """As LVIS v1 has it: ids 1..K, no file names; class j has j + 1 instances, all on image 1."""
    width, height = SIZE
    urls = {1: f"http://images.cocodataset.org/{split}/000000000001.jpg", 2: "http://x.org/val2017/000000000002.jpg"}
    pairs = [(label, number) for label in range(classes) for number in range(label + 1)]
    return {
        "categories": [
            {"id": j + 1, "name": f"name {j}", "synonyms": [f"class {j}", "other"], "frequency": "rcf"[j % 3]}
            for j in range(classes)
        ],
        "images": [
            {
                "id": id_,
                "coco_url": url,
                "width": width,
                "height": height,
                "not_exhaustive_category_ids": [2] if id_ == 1 else [],
                "neg_category_ids": [1, 3] if id_ == 2 else [],
            }
            for id_, url in urls.items()
        ],
        "annotations": [box(id_, 1, label + 1) for id_, (label, _) in enumerate(pairs, 1)],
    }


def write(folder, content, name="annotations.json"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def write_images(folder, *names, size=SIZE):
    """Noise, which neither PNG nor JPEG makes small."""
    generator = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
