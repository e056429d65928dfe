"""Train stage one or stage two: python -m disalign_cls.train CONFIG

Stage two starts from the config's stage_one (--cfg-options stage_one=FILE), trains 2K + d + 1 numbers, and prints
stage one's figures beside its own.
"""

import sys

from disalign.cli import command
from disalign_mmengine.cli import load_config, parser, runner_arguments, train

from .cli import build_runner


@command
def main(argv=None):
    arguments = runner_arguments(parser(__doc__))
    arguments.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the work folder")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    config.resume = args.resume or config.get("resume", False)
    train(build_runner(config, args), config)


if __name__ == "__main__":
    sys.exit(main())
