"""Evaluate a checkpoint: python -m disalign_cls.test CONFIG CHECKPOINT

A stage-two checkpoint prints stage one's figures beside its own. Everything, per class, goes to results_SPLIT.json in
the work folder.
"""

import sys

from disalign.cli import command
from disalign_mmengine.cli import config_errors, load_config, parser, runner_arguments

from .cli import build_runner


@command
def main(argv=None):
    args = runner_arguments(parser(__doc__, checkpoint="of the config's model")).parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    config.load_from, config.stage_one = args.checkpoint, None
    runner = build_runner(config, args)
    with config_errors(config.filename):
        _ = runner.test_loop
    runner.test()


if __name__ == "__main__":
    sys.exit(main())
