"""Export a classifier, its normalisation included: python -m disalign_cls.export CONFIG CHECKPOINT OUT

OUT ends in .pt (TorchScript: Python and C++) or .onnx (ONNX: onnxruntime and others); it then runs without this
package. In go uint8 images (N, C, H, W) in 0..255, RGB or gray, resized and cropped as in evaluation (TorchScript takes
floats too); out come scores (N, K), before the softmax. Class names, class counts and rho lie within as JSON: in
TorchScript's extra file "disalign.json", in ONNX's metadata as "disalign". The file is read back and must give the
model's own scores, for several batches and, where the backbone takes them, sizes of images.
"""

import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

import disalign
from disalign import InputError
from disalign.cli import command, config_errors
from disalign.errors import first_line
from disalign.io import atomic_file, require_place
from disalign_mmengine.checkpoints import class_names, metadata
from disalign_mmengine.cli import load_config, parser

from .cli import load_model

#: Largest difference to the model's own scores, relative to the largest of these.
TOLERANCE = 1e-5


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__, checkpoint="of the config's model", out="the file to write, .pt or .onnx")
    arguments.add_argument("--size", type=int, help="height and width of the images; default: the config's")
    arguments.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = arguments.parse_args(argv)
    suffix = Path(args.out).suffix
    if suffix not in FORMATS:
        raise InputError(f"expected OUT to end in {' or '.join(FORMATS)}, got {args.out!r}; TorchScript or ONNX?")
    require_place(args.out, [args.config, args.checkpoint], option="OUT", force=args.force)

    config = load_config(args.config, args.cfg_options)
    model, checkpoint = load_model(config, args.checkpoint)
    with config_errors(config.filename):
        size = image_size(config) if args.size is None else args.size
        deployed = Deployed(model, config.model.get("data_preprocessor") or {}).eval().requires_grad_(False)
        batches = example_batches(model, config.model.backbone.get("in_chans", 3), size)
    facts = {
        "disalign": disalign.__version__,
        "class_names": class_names(checkpoint),
        **(metadata(checkpoint).get("disalign") or {}),
        "image_size": size,
        # What an image goes through before: resized and cropped as in evaluation.
        "transforms": [dict(one) for one in config.test_dataloader.dataset.get("transforms", ())],
    }
    export, load = FORMATS[suffix]
    with warnings.catch_warnings(), atomic_file(args.out, "w+b") as file:
        warnings.simplefilter("ignore")  # the exporters' about themselves
        with exporting(suffix):
            content = export(deployed, batches, json.dumps(facts))
        file.write(content)
        file.seek(0)
        with exporting(suffix):
            run = load(file.read())
            exported = [run(images) for images in batches] if run else None
        if exported:
            difference = largest_difference(exported, [scores(model, images) for images in batches])
    sizes = "any size that the backbone takes" if takes_sizes(batches) else "no other size"
    print(f"wrote {args.out} ({len(content) / 1e6:.1f} MB) for images of {size} x {size} and {sizes}")
    if exported:
        print(f"largest difference to the model's own scores: {difference:.1e} of the largest score")
    else:
        print("not compared with the model's own scores, for want of onnxruntime: pip install onnxruntime")


@contextmanager
def exporting(suffix: str) -> Iterator[None]:
    """An exporter and its runtime fail as they like: in one sentence then."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"expected a model that can be exported to {suffix}, but: {first_line(error)}; try the other format"
        ) from error


def image_size(config: Config) -> int:
    """Height and width that the config evaluates at.

    Raises:
        InputError: it resizes or crops to none.
    """
    for transform in reversed(config.test_dataloader.dataset.get("transforms", ())):
        if isinstance(transform.get("size"), int):
            return transform["size"]
    raise InputError("expected --size, since the config's test images are not resized or cropped to any; give it")


class Deployed(nn.Module):
    """Pixels to scores: normalisation, backbone and classifier.

    Args:
        model: a :class:`disalign_cls.classifiers.ImageClassifier`.
        preprocessor: the config of its data preprocessor.

    Shapes: images (N, C, H, W) in 0..255; returns (N, K).

    Raises:
        InputError: a preprocessor that does more than normalise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: BaseModel, preprocessor: dict) -> None:
        super().__init__()
        more = set(preprocessor) - {"type", "mean", "std", "non_blocking"}
        if more:
            raise InputError(f"expected mean and std in data_preprocessor, got {', '.join(sorted(more))}; leave it out")
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(preprocessor.get(name) or [default], dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1))
        self.backbone = model.backbone
        self.classifier = model.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone((images.float() - self.mean) / self.std))


@torch.no_grad()
def scores(model: BaseModel, images: Tensor) -> Tensor:
    """The model's own, by its own data preprocessor."""
    return model(model.data_preprocessor({"inputs": images, "data_samples": None})["inputs"])


def example_batches(model: BaseModel, channels: int, size: int) -> list[Tensor]:
    """Random uint8 images: batches of 5 and 1, and one of another size if the model takes it.

    Raises:
        InputError: it does not take the size itself.
    """
    if size < 1:
        raise InputError(f"expected a size of at least 1 pixel, got {size}")
    random = torch.Generator().manual_seed(0)

    def images(number, height, width):
        return torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=random)

    try:
        batches, other = [images(5, size, size), images(1, size, size)], images(2, size + 32, size + 64)
        expected = scores(model, batches[0])
    except Exception as error:  # a backbone fails as it likes
        raise InputError(
            f"expected a backbone that takes images of {size} x {size}, but: {first_line(error)}; give their --size"
        ) from error
    if not expected.isfinite().all():
        raise InputError(
            "expected finite scores from the model itself, got NaN or infinity; look at the std, the weights"
        )
    try:
        scores(model, other)
    except Exception:
        return batches
    return [*batches, other]


def takes_sizes(batches: list[Tensor]) -> bool:
    """Whether the model takes images of several sizes."""
    return len({images.shape[2:] for images in batches}) > 1


def largest_difference(exported: list[Tensor], expected: list[Tensor]) -> float:
    """Between an exported model's scores and its own, batch by batch, relative to the largest of its own.

    Raises:
        InputError: it is too large.
    """
    # The maximum of tensors lets a NaN through.
    pairs = zip(exported, expected, strict=True)
    worst = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
    if not worst <= TOLERANCE:
        raise InputError(
            f"expected the model's own scores from its export, but they differ by {worst:.1e} of the largest score, "
            f"more than {TOLERANCE:.0e}; try the other format"
        )
    return worst


def to_torchscript(deployed: nn.Module, batches: list[Tensor], facts: str) -> bytes:
    """Scripted, not traced: a trace would keep the example's size wherever a backbone computes with it."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(deployed), buffer, _extra_files={"disalign.json": facts})
    return buffer.getvalue()


def load_torchscript(content: bytes) -> Any:
    return torch.jit.load(io.BytesIO(content))


def to_onnx(deployed: nn.Module, batches: list[Tensor], facts: str) -> bytes:
    """By torch's exporter of today (``dynamo=True``), with weights and metadata in the one file."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"expected {' and '.join(missing)} to write ONNX, got none; pip install {' '.join(missing)}")
    axes = {0: "N", 2: "H", 3: "W"} if takes_sizes(batches) else {0: "N"}
    program: Any = torch.onnx.export(
        deployed,
        (batches[0],),
        dynamo=True,
        dynamic_shapes=(axes,),
        input_names=["images"],
        output_names=["scores"],
        verbose=False,
    )
    model = program.model_proto
    model.metadata_props.add(key="disalign", value=facts)
    return model.SerializeToString()


def load_onnx(content: bytes) -> Any:
    if find_spec("onnxruntime") is None:
        return None
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


#: Ending -> how to write it, and how to run what was written.
FORMATS = {".pt": (to_torchscript, load_torchscript), ".onnx": (to_onnx, load_onnx)}


if __name__ == "__main__":
    sys.exit(main())
