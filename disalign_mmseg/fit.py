"""Stage two by one pass and a solver: python -m disalign_mmseg.fit CONFIG --stage-one FILE

One pass of stage one over the training images, with the evaluation's transforms, keeps its classifier's input for a
few pixels of each; then a solver without a learning rate learns the 2K + d + 1 numbers (disalign.fit). CONFIG is a
stage two's: its rho, class counts and calibration apply, its schedule does not. Writes a checkpoint to test and export
with CONFIG as any other, and evaluates it beside stage one.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmseg.utils import register_all_modules
from torch import nn

from disalign import fit
from disalign.cli import fit_arguments, fit_places, results_of, warnings_to_stderr
from disalign.fitting import require_options
from disalign_mmengine.cli import command_in_folder, load_config, test
from disalign_mmengine.hooks import stage_one_of
from disalign_mmengine.saving import save_fit

from .cli import build_model, collected, counted, linear_of, reshaped, sample_arguments, stage_one_for, start_from
from .collect import require_sample, training_set


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The command's options."""
    fit_arguments(arguments, "float16")
    sample_arguments(arguments)
    arguments.add_argument("--seed", type=int, default=0, help="of the pixels and images drawn; default: 0")
    arguments.add_argument("--test", action="store_true", help="evaluate each of several rho, in a folder of its own")


def run(args: argparse.Namespace, config: Config, folder: Path) -> None:
    """Run the pass and the fits, and test their checkpoints, in a folder."""
    register_all_modules(init_default_scope=True)
    path = args.stage_one or stage_one_of(config) or ""
    model = build_model(config)
    head, loss = model.calibrated_head, model.calibrated_head.loss_decode
    places = fit_places(folder, args.rho or [loss.rho], path, args.force)
    calibration = _options(head.calibration)
    chosen = {"anchor": args.anchor, "penalty": args.penalty}
    require_options(**chosen, **calibration)
    require_sample(args.pixels, args.images)
    dataset = training_set(config)
    start_from(model, stage_one_for(dataset, path), path)
    record = counted(model, dataset, folder)

    begun = time.perf_counter()
    features = collected(args, config, model, dataset, record, args.features)
    passed = time.perf_counter() - begun
    with warnings_to_stderr():
        found = fit(features, linear_of(head.conv_seg), [*places], zero_count=loss.zero_count, **chosen, **calibration)
    fitted = time.perf_counter() - begun - passed
    for rho, classifier in found.items():
        reshaped(head.calibration, classifier.calibration.state_dict())
        loss.rho = rho
        facts = loss.metadata() | {"total_pixels": record.get("total_pixels")}
        save_fit(places[rho], model, dataset.metainfo, facts, classifier.fit_report)
    print(classifier.fit_report.on_training_set())
    print(f"pass over {len(features)} pixels {passed:.1f} s, fit {fitted:.1f} s; written to {folder}")

    for rho, place in places.items():
        where = folder / place.stem
        if len(places) == 1 or args.test:
            print(f"\nrho {rho:g}")
            config = load_config(args.config, args.cfg_options)
            config.setdefault("runner_type", "DisAlignSegRunner")
            config.load_from, config.stage_one = str(place), None
            # MMEngine names its logs by this, and by the time in seconds.
            config.experiment_name = f"{config.get('experiment_name', Path(config.filename).stem)}_{place.stem}"
            test(config, argparse.Namespace(work_dir=str(where), launcher="none"))
            if (where / "results_test.json").exists():  # not with the config's own metric
                shutil.copyfile(where / "results_test.json", results_of(place))  # the log names the first
        else:
            print(f"test it: python -m disalign_mmseg.test {args.config} {place} --work-dir {where}")


def _options(calibration: nn.Module) -> dict[str, Any]:
    """The options of a head's calibration, as :func:`disalign.fit` takes them."""
    learnt = dict(calibration.named_parameters())
    return {
        "confidence": "learnt" if "confidence.weight" in learnt else "one",
        "learn_magnitude": "magnitude" in learnt,
        "learn_margin": "margin" in learnt,
    }


main = command_in_folder(__doc__, run, add_arguments)

if __name__ == "__main__":
    sys.exit(main())
