"""Export a classifier, its normalisation included: python -m disalign_cls.export CONFIG CHECKPOINT OUT

OUT ends in .pt (TorchScript: Python and C++) or .onnx (ONNX: onnxruntime and others); it then runs without this
package. Its input are uint8 images (N, C, H, W) in 0..255, RGB or gray, resized and cropped as in evaluation
(TorchScript takes floats too); its output are scores (N, K), before the softmax. Class names, class counts and rho are
stored inside as JSON: in TorchScript's extra file "disalign.json", in ONNX's metadata as "disalign". Before OUT is
written, the export is loaded and must reproduce the model's own scores, for several batch sizes and, if the backbone
accepts them, image sizes.
"""

import io
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
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
        batches, expected = examples(model, config.model.backbone.get("in_chans", 3), size)
    facts = {
        "disalign": disalign.__version__,
        "class_names": class_names(checkpoint),
        **(metadata(checkpoint).get("disalign") or {}),
        "image_size": size,
        # The preprocessing of an image: resized and cropped as in evaluation.
        "transforms": [dict(one) for one in config.test_dataloader.dataset.get("transforms", ())],
    }
    export, load = FORMATS[suffix]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about themselves
            content = export(deployed, batches, json.dumps(facts))
            run = load(content)
            difference = largest_difference([run(images) for images in batches], expected) if run else None
    except InputError:
        raise
    except Exception as error:  # an exporter and its runtime may raise anything
        raise InputError(
            f"expected a model that can be exported to {suffix}, but: {first_line(error)}; try the other format"
        ) from error
    with atomic_file(args.out) as file:
        file.write(content)
    sizes = "any size that the backbone accepts" if len(batches) > 2 else "no other size"
    print(f"wrote {args.out} ({len(content) / 1e6:.1f} MB) for images of {size} x {size} and {sizes}")
    if difference is None:
        print("not compared with the model's own scores, as onnxruntime is missing: pip install onnxruntime")
    else:
        print(f"largest difference from the model's own scores: {difference:.1e} of the largest score")


def image_size(config: Config) -> int:
    """Height and width that the config evaluates at."""
    for transform in reversed(config.test_dataloader.dataset.get("transforms", ())):
        if isinstance(transform.get("size"), int):
            return transform["size"]
    raise InputError("expected --size, since the config's test images have no fixed size, got none; give it")


class Deployed(nn.Module):
    """Pixels (N, C, H, W) in 0..255 to scores (N, K): an ImageClassifier with its normalisation.

    ``preprocessor`` is the config of its data preprocessor; one that does more than normalise is refused.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: BaseModel, preprocessor: dict) -> None:
        super().__init__()
        more = set(preprocessor) - {"type", "mean", "std", "non_blocking"}
        if more:
            raise InputError(f"expected mean and std in data_preprocessor, got {', '.join(sorted(more))}; leave it out")
        for name, default in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, getattr(model.data_preprocessor, name, torch.tensor(default)))
        self.backbone = model.backbone
        self.classifier = model.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone((images.float() - self.mean) / self.std))


@torch.no_grad()
def examples(model: BaseModel, channels: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random uint8 images and the model's own scores of them: 5 and 1, and 2 of another size if the model takes it."""
    if size < 1:
        raise InputError(f"expected a size of at least 1 pixel, got {size}")
    random = torch.Generator().manual_seed(0)
    batches, scores = [], []

    def add(number, height, width):
        images = torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=random)
        scores.append(model(model.data_preprocessor({"inputs": images, "data_samples": None})["inputs"]))
        batches.append(images)

    try:
        add(5, size, size)
        add(1, size, size)
    except Exception as error:  # a backbone may raise anything
        raise InputError(
            f"expected a backbone that takes images of {size} x {size}, but: {first_line(error)}; give their --size"
        ) from error
    if not scores[0].isfinite().all():
        raise InputError(
            "expected finite scores from the model itself, got NaN or infinity; check the std and the weights"
        )
    with suppress(Exception):
        add(2, size + 32, size + 64)
    return batches, scores


def largest_difference(exported: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over the batches, relative to the largest ``expected`` score of the batch."""
    # Unlike Python's, the maximum of tensors propagates NaN.
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


def to_onnx(deployed: nn.Module, batches: list[Tensor], facts: str) -> bytes:
    """By torch's current exporter (``dynamo=True``), with weights and metadata in one file."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"expected {' and '.join(missing)} to write ONNX, got none; pip install {' '.join(missing)}")
    axes = {0: "N", 2: "H", 3: "W"} if len(batches) > 2 else {0: "N"}
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
FORMATS = {".pt": (to_torchscript, lambda content: torch.jit.load(io.BytesIO(content))), ".onnx": (to_onnx, load_onnx)}


if __name__ == "__main__":
    sys.exit(main())
