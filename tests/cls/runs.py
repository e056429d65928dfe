"""Quick runs of the digits configs, in this process."""

import itertools
from pathlib import Path

from mmengine.runner import Runner

from disalign_cls import test as test_command
from disalign_cls import train as train_command
from disalign_mmengine.cli import load_config

BASELINE = {
    "linear": "cls/digits/baseline_cnn_1xb64-60e_digits-lt.py",
    "cosine": "cls/digits/baseline-cosine_cnn_1xb64-60e_digits-lt.py",
}
DISALIGN = {
    "linear": "cls/digits/disalign_cnn_1xb64-60e_digits-lt.py",
    "cosine": "cls/digits/disalign-cosine_cnn_1xb64-60e_digits-lt.py",
}
#: No random augmentation.
PLAIN = "train_dataloader.dataset.transforms=[]"

_numbers = itertools.count()


def quick(epochs: int = 2) -> list[str]:
    """Options of every run: few epochs, no TensorBoard, and a name of its own, which mmengine's globals go by."""
    return [
        f"experiment_name=run{next(_numbers)}",
        "visualizer.vis_backends=[]",
        f"train_cfg.max_epochs={epochs}",
        f"train_cfg.val_interval={epochs}",
    ]


def train(config: str, work_dir, *options: str, epochs: int = 2, flags=()) -> int:
    """Exit status of ``disalign_cls.train``."""
    return train_command.main([config, "--work-dir", str(work_dir), *flags, "--cfg-options", *quick(epochs), *options])


def evaluate(config: str, checkpoint, work_dir, *options: str) -> int:
    """Exit status of ``disalign_cls.test``."""
    return test_command.main(
        [config, str(checkpoint), "--work-dir", str(work_dir), "--cfg-options", *quick(), *options]
    )


def runner(config: str, work_dir, epochs: int = 2, **options) -> Runner:
    """The Runner that the commands would run."""
    given = dict(option.split("=", 1) for option in quick(epochs)) | {
        "visualizer.vis_backends": [],
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": epochs,
    }
    cfg = load_config(config, given | options)
    cfg.work_dir = str(work_dir)
    return Runner.from_cfg(cfg)


def log(work_dir) -> str:
    """All that the runs in a work folder have logged."""
    return "".join(path.read_text() for path in sorted(Path(work_dir).glob("*/*.log")))


def left_behind(folder) -> list[str]:
    """Checkpoints, results and caches below a folder."""
    return [str(path) for path in Path(folder).rglob("*") if path.suffix in (".pth", ".json", ".npz", ".disalign-tmp")]
