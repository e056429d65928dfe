"""Evaluate a checkpoint without mim: python -m disalign_mmseg.test CONFIG CHECKPOINT

A stage-two checkpoint gets stage one's figures beside its own. Everything, per class, goes to results_test.json in the
work folder.
"""

import sys

from disalign import InputError
from disalign_mmengine.cli import command_to_test


def _adapt(config, args) -> None:
    config.setdefault("runner_type", "DisAlignSegRunner")  # reads stage one's own checkpoints safely too
    if args.tta:
        if not (config.get("tta_model") and config.get("tta_pipeline")):
            raise InputError("expected tta_model and tta_pipeline in the config for --tta, got none; test without it")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = dict(config.tta_model, module=config.model)


main = command_to_test(__doc__, _adapt, tta="flip and multi-scale testing, by the config's tta_model")

if __name__ == "__main__":
    sys.exit(main())
