"""Train stage one or stage two: python -m disalign_cls.train CONFIG

Stage two starts from the config's stage_one (--cfg-options stage_one=FILE), trains 2K + d + 1 numbers, and prints
stage one's figures beside its own.
"""

import sys

from disalign.cli import command

from .cli import build_runner, config_errors, load_config, parser, runner_arguments


@command
def main(argv=None):
    arguments = runner_arguments(parser(__doc__))
    arguments.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the work folder")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    config.resume = args.resume or config.get("resume", False)
    runner = build_runner(config, args)
    with config_errors(config.filename):
        # Built here, data and all, so that whatever does not fit is said before the first step.
        _ = runner.train_loop, runner.val_loop
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        runner.auto_scale_lr = None  # once is enough: train() would scale again
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.train()


if __name__ == "__main__":
    sys.exit(main())
