"""What the benchmarks share: steps in turns, their peak memory, ratios, and what they ran on."""

import argparse
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from disalign.io import write_json

Step = Callable[[], object]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def turns(rounds: int, work: Mapping[str, Step], warm_up: int = 0) -> dict[str, list[float]]:
    """Seconds of each, one after the other, ``rounds`` times."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in tqdm(range(warm_up + rounds), "turns"):
        for name, run in work.items():
            wait()
            begun = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - begun)
    return {name: found[warm_up:] for name, found in seconds.items()}


def measure(
    names: Sequence[str], build: Callable[[str], Step], rounds: int, device: str, preload: str
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, Step]]:
    """By name: peak memory in MiB, the seconds of each turn, and the step that ``build`` makes of the name.

    The peak memory is that of two steps, since the optimizer's state comes with the first: on a CPU resident in a
    process of its own, above what the imports take (``preload`` has most of them); on a GPU allocated, without the
    other models. ``build`` can be pickled, and knows the name "full".
    """
    if device != "cpu":
        peaks, built = _allocated(names, build)
    else:
        # A forkserver imports once, and its processes are small at the start.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload])
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            peaks = {name: pool.submit(_resident, build, name).result() for name in tqdm(names, "memory")}
        built = {name: build(name) for name in names}
    # On a GPU the loss scale of mixed precision has settled after a few.
    return peaks, turns(rounds, built, 1 if device == "cpu" else 5), built


def _resident(build: Callable[[str], Step], name: str) -> float:
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = build(name)
    for _ in range(2):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports) / 2**10


def _allocated(names: Sequence[str], build: Callable[[str], Step]) -> tuple[dict[str, float], dict[str, Step]]:
    peaks: dict[str, float] = {}
    built: dict[str, Step] = {}
    for name in tqdm(["full", *names], "memory"):  # the first also allocates what all share, such as workspaces
        built.pop(name, None)
        gc.collect()
        before = torch.cuda.memory_allocated()
        built[name] = build(name)
        built[name]()
        torch.cuda.reset_peak_memory_stats()  # cuDNN has tried its kernels
        built[name]()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peaks, built


def train(model, loss, optimizer, scaler, x, labels) -> None:
    """A training step on :data:`DEVICE`, in mixed precision if the scaler is enabled."""
    with torch.autocast(DEVICE, enabled=scaler.is_enabled()):
        value = loss(model(x), labels)
    optimizer.zero_grad()
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()


def quotient(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of two steps' seconds, turn by turn: the median, the least and the most."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(found), "least": min(found), "most": max(found)}


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    return "{ratio:.2f} ({least:.2f}-{most:.2f})".format(**quotient(over, under))


def table(
    titles: Mapping[str, str],
    memory: Mapping[str, float],
    seconds: Mapping[str, Sequence[float]],
    of_seconds: Callable[[str], tuple[str, str]],
    of_memory: Callable[[str], tuple[str, str]],
) -> list[dict[str, Any]]:
    """Print a row for each step, and return it for JSON; the functions name the two steps whose ratio stands there."""
    rows = []
    for name, title in titles.items():
        over, under = of_seconds(name)
        row: dict[str, Any] = {"step": title, "turns": seconds[name], "seconds": statistics.median(seconds[name])}
        row |= quotient(seconds[over], seconds[under])
        over, under = of_memory(name)
        row |= {"peak_mib": memory[name], "peak_ratio": memory[over] / memory[under]}
        rows.append(row)
        cells = "| {step} | {seconds:.4g} | {ratio:.2f} ({least:.2f}-{most:.2f}) | {peak_mib:.0f} | {peak_ratio:.2f} |"
        print(cells.format(**row))
    return rows


def report(about: str, facts: Mapping[str, Any], ratios: tuple[str, str], out: str | None, *cells: Any) -> None:
    """Print what was measured and the :func:`table` of ``cells``, whose ratios have these names; also to ``out``."""
    print(f"{about}; {line(facts)}\n\n| step | s | {ratios[0]} | peak MiB | {ratios[1]} |\n|---|---|---|---|---|")
    rows = table(*cells)
    if out:
        write_json(out, {"about": about, **facts, "rows": rows})


def amp_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--amp", action="store_true", help="mixed precision: fp16 by autocast, with a loss scale")


def ran_on(device: str, amp: bool, repeats: int) -> dict[str, Any]:
    """Plain values for the JSON, and for the line above a table."""
    autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return {
        "torch": torch.__version__,
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": f"{autocast} by autocast" if amp else "float32",
        "threads": torch.get_num_threads(),
        "turns": repeats,
    }


def line(facts: Mapping[str, Any]) -> str:
    return "torch {torch}, {device}, {dtype}, {threads} thread(s), {turns} turn(s)".format(**facts)
