"""Evaluate a checkpoint without mim: python -m disalign_mmseg.test CONFIG CHECKPOINT

A stage-two checkpoint gets stage one's figures beside its own. Everything, per class, goes to results_test.json in the
work folder.
"""

import sys

from disalign import InputError
from disalign.cli import command
from disalign_mmengine.cli import build_runner, config_errors, load_config, parser, runner_arguments


@command
def main(argv=None):
    arguments = runner_arguments(parser(__doc__, checkpoint="of the config's model"))
    arguments.add_argument("--tta", action="store_true", help="flip and multi-scale testing, by the config's tta_model")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    config.load_from, config.stage_one = args.checkpoint, None
    config.setdefault("runner_type", "DisAlignSegRunner")  # reads stage one's own checkpoints safely too
    if args.tta:
        if not (config.get("tta_model") and config.get("tta_pipeline")):
            raise InputError("expected tta_model and tta_pipeline in the config for --tta, got none; test without it")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = dict(config.tta_model, module=config.model)
    runner = build_runner(config, args)
    with config_errors(config.filename):
        _ = runner.test_loop
    runner.test()


if __name__ == "__main__":
    sys.exit(main())
