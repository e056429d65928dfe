"""Is DisAlign better than the two-line fix? python -m disalign_mmseg.compare CONFIG --stage-one FILE [FILE ...]

One pass of each stage one over the training images keeps its classifier's input for a few pixels of each, and every
method (disalign.compare) learns from it. Then the network sees each test image once, and all methods are evaluated
on its scores, as python -m disalign_mmseg.test does, without test-time augmentation. CONFIG is a stage two's. Several
stage ones give mean +- standard deviation. Nothing is tuned on the test images. Prints a table and writes
comparison.json, for `disalign report`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import autocast
from mmseg.utils import register_all_modules
from torch import Tensor, nn
from tqdm import tqdm

from disalign import AdaptiveCalibration, InputError
from disalign.cli import compare_arguments, compare_place, config_errors, features_of, write_comparison
from disalign.collecting import evaluating
from disalign.comparison import (
    Candidate,
    Problem,
    Tally,
    candidates,
    chosen_methods,
    comparison,
    evaluated,
    group_names,
    run_record,
)
from disalign.stage_two import require_same_classes
from disalign_mmengine.cli import command_in_folder
from disalign_mmengine.hooks import stage_one_of

from .cli import build_model, collected, counted, linear_of, reshaped, sample_arguments, stage_one_for, start_from
from .collect import require_sample, training_set
from .metrics import LongTailIoUMetric
from .runner import DisAlignSegRunner

#: Figure -> its title in the table; comparison.json has more.
COLUMNS = {
    "mIoU": "mIoU",
    "balanced": "mAcc",
    "average": "aAcc",
    "mIoU.head": "IoU head",
    "mIoU.body": "IoU body",
    "mIoU.tail": "IoU tail",
    "ece": "ECE",
}


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The command's options."""
    compare_arguments(arguments, "float16")
    sample_arguments(arguments)


def run(args: argparse.Namespace, config: Config, folder: Path) -> None:
    """Run the passes and the methods, and print the table."""
    register_all_modules(init_default_scope=True)
    model = build_model(config)
    loss = model.calibrated_head.loss_decode
    paths = args.stage_one or [stage_one_of(config) or ""]
    rho = loss.rho if args.rho is None else args.rho
    place = compare_place(folder, [rho, *args.sweep], paths, args.force)
    chosen_methods(args.methods, "segmentation", cosine=False)
    require_sample(args.pixels, args.images)
    dataset = training_set(config)
    for path in paths:  # the last one is only read after the passes of the others
        stage_one_for(dataset, path)
    record = counted(model, dataset, folder)
    names = chosen_methods(args.methods, "segmentation", False, {"examples": loss.class_counts})
    loader, metric = evaluation(config, dataset)
    metric.take_counts(loss.class_counts, record.get("total_pixels"))

    fp16 = bool((config.get("test_cfg") or {}).get("fp16"))
    runs = []
    for number, path in enumerate(paths):
        start_from(model, stage_one_for(dataset, path), path)
        begun = time.perf_counter()
        features = collected(args, config, model, dataset, record, features_of(args.features, number, len(paths) > 1))
        passed = time.perf_counter()
        linear = linear_of(model.calibrated_head.conv_seg)
        problem = Problem(features, linear, rho, seed=args.seed, zero_count=loss.zero_count)
        found, notes = candidates(problem, names, sweep=args.sweep)
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        learnt = time.perf_counter()
        records = evaluate(model, loader, found, metric, fp16)
        seconds = {
            "pass_seconds": passed - begun,
            "learning_seconds": learnt - passed,
            "evaluation_seconds": time.perf_counter() - learnt,
        }
        train = {"balanced": problem.train_accuracy}
        runs.append(run_record(records, stage_one=path, seed=args.seed, notes=notes, train=train, **seconds))
        told = ", ".join(f"{name.removesuffix('_seconds')} {value:.1f} s" for name, value in seconds.items())
        print(f"{len(found)} classifiers from {len(features)} pixels: {told}")
    content = comparison(
        runs,
        COLUMNS,
        task="segmentation",
        dataset=type(loader.dataset).__name__,
        split="test",
        rho=rho,
        settings="defaults",
        examples=len(loader.dataset),
        classes=list(loader.dataset.metainfo["classes"]),
        class_counts=loss.class_counts.tolist(),
        group_of=group_names(metric.members() or {}),
        groups_text=metric.groups_text(),
        command=args.command,
    )
    write_comparison(place, content)


def evaluation(config: Config, dataset: Any) -> tuple[Any, LongTailIoUMetric]:
    """A loader of a config's test set, one image at a time, and its metric; ``dataset`` is the training set.

    Raises:
        InputError: a set or metric that can't be built, or other classes than the training set's.
    """
    with config_errors(config.filename):
        loader: Any = DisAlignSegRunner.build_dataloader(dict(config.test_dataloader, batch_size=1))
        metrics = Evaluator(config.test_evaluator).metrics
    metric = next((one for one in metrics if isinstance(one, LongTailIoUMetric)), None) or LongTailIoUMetric()
    classes = loader.dataset.metainfo["classes"]
    require_same_classes(dataset.metainfo.get("classes"), classes, "the test set")
    metric.dataset_meta = loader.dataset.metainfo
    return loader, metric


@torch.no_grad()
def evaluate(
    model: Any, loader: Iterable, found: Sequence[Candidate], metric: LongTailIoUMetric, fp16: bool = False
) -> list[dict[str, Any]]:
    """Evaluate many classifiers on test images, each of which the network sees once.

    Args:
        model: stage two's with stage one's weights, its calibration at the identity.
        loader: batches of one image.
        found: the first is stage one's classifier.
        metric: defines the groups, and which labels count.
        fp16: use autocast, see ``test_cfg.fp16``.

    Returns:
        The result of :func:`disalign.comparison.evaluated` for each; a learnt confidence's histogram is over the pixels
        of the head's own grid.

    Raises:
        InputError: a head whose scores are not its classifier's; missing ground truth, or labels that do not fit.
    """
    head = model.calibrated_head
    groups = metric.members() or {}
    calibrations = [spatial(one.calibration).to(head.conv_seg.weight.device) for one in found]
    tallies = [Tally(head.num_classes, groups, one.method.probabilities) for one in found]
    with evaluating(model), autocast(enabled=fp16):
        for batch in tqdm(loader, "evaluating", unit="image", mininterval=1, delay=5):
            ready = model.data_preprocessor(batch, training=False)
            with recorded(head.calibration) as calls:
                (sample,) = model(**ready, mode="predict")
            metric.refuse_other_classes(sample.to_dict())
            label, expected = sample.gt_sem_seg.data.flatten(), sample.seg_logits.data
            label = label.to(expected.device)
            valid = label != metric.ignore_index
            for number, calibration in enumerate(calibrations):
                with replayed(model, calls, calibration):
                    (sample,) = model(**ready, mode="predict")
                scores = sample.seg_logits.data
                if number == 0 and not torch.allclose(scores, expected):
                    raise InputError(
                        f"expected {type(head).__name__} to score by its classifier alone, but it changes the scores "
                        "afterwards; compare checkpoints of disalign_mmseg.fit by disalign_mmseg.test"
                    )
                tallies[number].add(scores.flatten(1).T[valid], label[valid])
                if calibration.confidence is not None and found[number].role == "method":
                    for _, features in calls:
                        tallies[number].add_confidence(calibration.confidence_score(features))
    return [
        evaluated(one, tally.figures(), per_class=tally.per_class(), **tally.details())
        for one, tally in zip(found, tallies, strict=True)
    ]


@contextmanager
def recorded(calibration: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context that records the inputs of each call of a calibration: (1, K, h, w) scores and (1, d, h, w) features."""
    calls: list[Any] = []
    hook = calibration.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def replayed(model: Any, calls: Sequence[tuple[Tensor, Tensor]], calibration: AdaptiveCalibration) -> Iterator[None]:
    """Context in which a model predicts from :func:`recorded` calls, with another calibration than its own.

    There is one call for each image, or for each crop of a sliding window, in order; the rest is the segmentor's own.
    """
    left = iter(calls)

    def encode_decode(_: Tensor, metas: list[Mapping]) -> Any:
        return model.calibrated_head.predict_by_feat(calibration(*next(left)), metas)

    model.encode_decode = encode_decode
    try:
        yield
    finally:
        del model.encode_decode


def spatial(calibration: AdaptiveCalibration) -> AdaptiveCalibration:
    """The same calibration for scores (N, K, h, w) and features (N, d, h, w)."""
    found = copy.deepcopy(calibration)
    if isinstance(found.confidence, nn.Linear):
        convolution = nn.utils.skip_init(nn.Conv2d, found.confidence.in_features, 1, 1)
        found.confidence = reshaped(convolution, found.confidence.state_dict())
    return found


main = command_in_folder(__doc__, run, add_arguments, below="compare")

if __name__ == "__main__":
    sys.exit(main())
