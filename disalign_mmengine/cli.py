"""Code for all commands: configs and the Runner, with one-sentence errors."""

import argparse
import errno
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from disalign import InputError
from disalign.cli import as_typed, command, config_errors, find_config, log_to_stderr
from disalign.errors import some
from disalign.io import locked_folder, require_folder

from .checkpoints import load_checkpoint
from .hooks import stage_one_of
from .runner import to_resume

#: Error numbers of a disk that is full or has become read-only.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class KeyValue(DictAction):
    """MMEngine's KEY=VALUE action; anything else is an argparse error."""

    def __call__(self, arguments: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(arguments, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            arguments.error(f"{option_string}: expected KEY=VALUE, got {' '.join(values)!r}: {error}")


def parser(doc: str, **names: str) -> argparse.ArgumentParser:
    """The arguments of all commands; ``names`` maps further positional ones to their help."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="a config file, or the name of a shipped one below configs/")
    for name, text in names.items():
        result.add_argument(name, help=text)
    result.add_argument("--cfg-options", nargs="+", action=KeyValue, default={}, help="KEY=VALUE, overrides the config")
    return result


Adapt = Callable[[Config, argparse.Namespace], None]


def command_to_train(doc: str, adapt: Adapt) -> Callable:
    """The ``main`` of a command that trains; ``adapt`` may change the config before the Runner is built."""

    @command
    def main(argv=None):
        arguments = _runner_arguments(parser(doc))
        arguments.add_argument("--resume", action="store_true", help="resume the work folder's latest checkpoint")
        arguments.add_argument("--amp", action="store_true", help="train with mixed precision")
        args = arguments.parse_args(argv)
        config = load_config(args.config, args.cfg_options)
        config.resume = args.resume or config.get("resume", False)
        if args.amp:
            config.optim_wrapper.type = "AmpOptimWrapper"
        adapt(config, args)
        train(build_runner(config, args), config)

    return main


def command_to_test(doc: str, adapt: Adapt, **switches: str) -> Callable:
    """The ``main`` of a command that evaluates a checkpoint; ``switches`` maps further options to their help."""

    @command
    def main(argv=None):
        arguments = _runner_arguments(parser(doc, checkpoint="of the config's model"))
        for name, text in switches.items():
            arguments.add_argument(f"--{name}", action="store_true", help=text)
        args = arguments.parse_args(argv)
        config = load_config(args.config, args.cfg_options)
        config.load_from, config.stage_one = args.checkpoint, None
        adapt(config, args)
        test(config, args)

    return main


def command_in_folder(
    doc: str,
    run: Callable[[argparse.Namespace, Config, Path], None],
    add_arguments: Callable[[argparse.ArgumentParser], None],
    below: str = "",
) -> Callable:
    """The ``main`` of a command without a Runner: it learns from features, and writes into a folder.

    Args:
        doc: the command's description.
        run: does the work, in the folder, which is locked; its arguments' ``command`` is the line that was typed.
        add_arguments: adds its options.
        below: subfolder of the work folder to write into; the option is then ``--out``.
    """
    option = "--out" if below else "--work-dir"

    @command
    def main(argv=None):
        arguments = parser(doc)
        add_arguments(arguments)
        place = Path("work_dirs/CONFIG'S NAME", below)
        arguments.add_argument(option, dest="work_dir", metavar="DIR", help=f"to write into; default: {place}")
        args = arguments.parse_args(argv)
        args.command = as_typed(run, argv)
        log_to_stderr()
        config = load_config(args.config, args.cfg_options)
        folder = Path(args.work_dir or Path(_work_dir(config, args), below))
        require_folder(folder)
        with locked_folder(folder, option):
            run(args, config, folder)

    return main


def test(config: Config, args: argparse.Namespace) -> None:
    """Evaluate the config's ``load_from`` checkpoint by its Runner."""
    runner = build_runner(config, args)
    with config_errors(config.filename):
        _ = runner.test_loop
    runner.test()


def _runner_arguments(result: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _work_dir_argument(result)
    result.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")
    return result


def _work_dir_argument(result: argparse.ArgumentParser) -> None:
    result.add_argument("--work-dir", help="for logs, checkpoints and results; default: work_dirs/CONFIG'S NAME")


def _work_dir(config: Config, args: argparse.Namespace) -> str:
    return args.work_dir or config.get("work_dir") or f"work_dirs/{Path(config.filename).stem}"


def load_config(path: str, options: dict) -> Config:
    """Read a config and set ``options`` in it, whose first words must be keys of the config or of the Runner."""
    path = find_config(path)
    with config_errors(path, (Exception,)):  # a config is Python: it may raise anything
        config = Config.fromfile(path)
    known = set(config) | set(inspect.signature(Runner.__init__).parameters)
    unknown = sorted({key.split(".")[0] for key in options} - known)
    if unknown:
        raise InputError(f"expected --cfg-options of keys that the config has, got {some(unknown)}")
    with config_errors(path):
        config.merge_from_dict(options)
    return config


def build_runner(config: Config, args: argparse.Namespace) -> Runner:
    """The config's Runner for the parsed arguments; it refuses a bad checkpoint before it opens its logs."""
    config.launcher = args.launcher
    config.work_dir = _work_dir(config, args)
    require_folder(config.work_dir)
    path = to_resume(config.work_dir) if config.get("resume") else stage_one_of(config)
    if config.get("resume"):
        config.load_from = path  # mmengine would resume what load_from says
    _launch(config)
    if path and "://" not in path:
        load_checkpoint(path)
    with config_errors(config.filename):
        return RUNNERS.build(config)


def _launch(config) -> None:
    if config.launcher == "pytorch" and "RANK" not in os.environ:
        raise InputError(
            "expected a process of torchrun for --launcher pytorch, got a plain one; start it with torchrun "
            "--nproc_per_node N -m, or leave out --launcher"
        )
    if config.launcher == "none" or torch.cuda.is_available():
        return
    if config.launcher == "slurm":
        raise InputError("expected a GPU for --launcher slurm, got none; on CPUs use torchrun and --launcher pytorch")
    # mmengine would pick a CUDA device for the rank; joining the group first leaves it nothing to do.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)


def train(runner: Runner, config: Config) -> None:
    """Train; everything, the data included, is built first, so that errors come before the first step."""
    if config.get("val_dataloader") is not None and config.train_cfg.get("val_interval") == 0:
        raise InputError("expected 1 or more as train_cfg.val_interval, got 0; for no evaluation, set a large one")
    with config_errors(config.filename):
        _ = runner.train_loop, runner.val_loop
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        runner.auto_scale_lr = None  # once is enough: train() would scale again
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    try:
        runner.train()
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"expected room to write in {config.work_dir!r}, but: {error.strerror}; free some, then add --resume"
        ) from error
