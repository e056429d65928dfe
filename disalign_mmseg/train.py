"""Train from a config without mim: python -m disalign_mmseg.train CONFIG --cfg-options stage_one=FILE

Stage two starts from stage one's checkpoint, trains 2K + d + 1 numbers, and ends with both stages' figures side by
side.
"""

import sys

from disalign.cli import command
from disalign_mmengine.cli import build_runner, load_config, parser, runner_arguments, train


@command
def main(argv=None):
    arguments = runner_arguments(parser(__doc__))
    arguments.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the work folder")
    arguments.add_argument("--amp", action="store_true", help="train with mixed precision")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    config.resume = args.resume or config.get("resume", False)
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
    train(build_runner(config, args), config)


if __name__ == "__main__":
    sys.exit(main())
