"""One pass of a frozen network over a dataset that keeps the input of its classifier."""

import datetime
import hashlib
import itertools
import json
import logging
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.hub import tqdm  # the real one where it is installed
from torch.utils.data import DataLoader

from .counts import ClassCounts, load_class_counts
from .errors import InputError, some
from .features import DTYPES, Features, require_finite_rows
from .freezing import fingerprints, frozen_tensors
from .functional import check_labels
from .hand_over import plain_names
from .io import locked_folder, require_folder
from .io.arrays import BLOCK, NO_ROWS, RECORD, Arrays, Parts, read_arrays, require_room
from .io.images import MOST_CLASSES

log = logging.getLogger("disalign")

#: Rows that a pass into a folder compares with what is there.
SAMPLE = 16

#: Runs a model on a batch; from both to the batch's labels (n,) and the model's output.
Step = Callable[[nn.Module, Any], tuple[Tensor, Any]]
#: From items to pieces of them in that order, none of items of two blocks: of how many items it is, and its rows.
Pass = Callable[[Sequence[int]], Iterator[tuple[int, Mapping[str, Any]]]]


def run_batch(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """A :data:`Step` for batches of (inputs, labels), and for mappings with ``labels`` (Hugging Face)."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return batch["labels"], model(**inputs)
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[1], model(batch[0].to(device))
    raise InputError(
        f"expected batches of (inputs, labels), or mappings with 'labels', got {type(batch).__name__}; give step=..., "
        "a function that takes model and batch and returns labels and the model's output"
    )


def collect(
    model: nn.Module,
    loader: DataLoader[Any],
    classifier: str | nn.Module | None = None,
    *,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    class_counts: ClassCounts | None = None,
    weights: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    step: Step = run_batch,
    data: str | None = None,
    random: bool = False,
) -> Features:
    """Run a network once over a dataset and keep the input of its classifier, in the dataset's order.

    The network runs in eval mode without gradients, on its own device and under the active autocast. In distributed
    training each rank processes a share, and all return the whole.

    Args:
        model: any trained network.
        loader: its dataset, batch size, workers and collation are used; its order is not.
        classifier: the module whose input is kept, or its name; default: the model's output is kept.
        out: folder for the features, if they do not fit in memory (N x d x 2 or 4 bytes) or are used again. An
            interrupted pass is resumed; a complete one of the same trunk and data is opened, not run again.
        dtype: dtype of the features.
        class_counts, weights, groups: :meth:`Features.from_arrays`'s.
        step: function that runs the model on a batch.
        data: description of the data and its transforms; compared, like the trunk's tensors, when ``out`` is used
            again. Default: the dataset's repr.
        random: whether the dataset applies random transforms, so that passes differ.

    Raises:
        InputError: unknown classifier; features that are not (n, d) or not finite (the rows are named); labels out of
            range; not enough disk space; or ``out`` holds features of another trunk or other data.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.randn(6, 8), torch.tensor([0, 0, 0, 1, 1, 2]))
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> disalign.collect(model, torch.utils.data.DataLoader(data, batch_size=4), classifier="2")
        Features(6 x 4 float32, 3 classes)
    """
    name, layer = _find(model, classifier)
    if dtype not in DTYPES:
        raise InputError(f"expected to keep features as one of {some(DTYPES)}, got {dtype}")
    if not hasattr(loader.dataset, "__len__"):
        raise InputError(f"expected a data set with a length, got {type(loader.dataset).__name__}; use a map-style one")
    rows = len(loader.dataset)
    if not rows:
        raise InputError("expected a data set with examples, got an empty one")
    given = Features.from_arrays(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.long), weights, groups=groups)
    known = {"weights": given.weights} | ({} if given.groups is None else {"groups": given.groups})
    counts = None if class_counts is None else load_class_counts(class_counts)
    num_labels = MOST_CLASSES if counts is None else len(counts)
    with _input_of(layer) as seen, evaluating(model):

        @torch.no_grad()
        def run(chosen: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
            batches, loaded = _batches(loader, chosen)
            for asked, batch in zip(batches, loaded, strict=True):
                seen.clear()
                labels, output = step(model, batch)
                labels = check_labels(torch.as_tensor(labels).cpu(), num_labels, ignore_index=None)
                x = _as_rows(_only(seen, name) if layer else output, labels).to("cpu", dtype)
                if len(x) != len(asked):
                    raise InputError(
                        f"expected {len(asked)} examples in a batch, got {len(x)}; let the collate function keep all"
                    )
                require_finite_rows(x, asked)
                yield len(x), {"x": x, "y": labels} | {key: values[asked] for key, values in known.items()}

        ((_, first),) = run([0])
        source = {
            "trunk": trunk_digest(model, name),
            "classifier": name,
            # Objects without a repr of their own show their address.
            "data": re.sub(r" at 0x[0-9a-f]+", "", repr(loader.dataset)) if data is None else data,
            "rows": rows,
            "arrays": [str(dtype), first["x"].shape[1]],
            "weights or groups": _digest(known),
            "class_counts": None if counts is None else counts.tolist(),
        }
        size = rows * sum(values[0].nbytes for values in first.values())
        return run_pass(rows, run, source, out, size=size, compared=() if random else spread(rows), class_counts=counts)


def spread(items: int, most: int = SAMPLE) -> list[int]:
    """A few items all over a set: they tell another list or transform from the one that a folder was filled with."""
    return sorted({place * (items - 1) // max(most - 1, 1) for place in range(most)})


def run_pass(
    items: int,
    run: Pass,
    source: Mapping[str, Any],
    out: str | PathLike[str] | None = None,
    *,
    size: int,
    exact: bool = True,
    block: int = BLOCK,
    compared: Sequence[int] = (),
    group_of: Callable[[int], int] | None = None,
    **facts: Any,
) -> Features:
    """Run a pass over items (images), of any number of rows each, in memory or in a folder, and over all ranks.

    Args:
        items: how many there are.
        run: the pass.
        source: plain values that say what the rows are from; the rows of another source in ``out`` are refused.
        out: :func:`collect`'s.
        size: bytes of all rows, ``exact`` or about; an exact need is refused where there is no room for it.
        block: items that a killed pass loses at most, on each rank.
        compared: items whose rows, where ``out`` has them already, must come out again.
        group_of: from an item to the group of its rows; ``None`` if each item has one row.
        facts: ``class_counts``, ``background`` and ``totals`` of :meth:`Features.from_arrays`; they are those of this
            call, whatever ``out`` says.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    made = {"date": datetime.date.today().isoformat(), "versions": versions, **source}
    number, (rank, ranks) = -(-items // block), rank_and_number()
    if out is None:
        kept = dict(_blocks(items, run, range(number)[rank::ranks], block))
        if ranks > 1:
            shares: list[Any] = [None] * ranks
            through_the_cpu = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
            dist.all_gather_object(shares, kept, through_the_cpu)
            kept = {place: arrays for share in shares for place, arrays in share.items()}
        arrays: Any = _joined([kept[place] for place in sorted(kept)])
        if not len(arrays["y"]):
            raise InputError(NO_ROWS)
        return Features.from_arrays(**arrays, **facts, provenance=made)
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in facts.items()}
    require_folder(out)
    parts = Parts(out, number, {"source": source, **plain, "provenance": made}, [items, block])
    with locked_folder(out, "the folder of features") if rank == 0 else nullcontext():
        if rank == 0:
            about = "up to" if exact else "about"
            log.info("features of %d examples take %s %.1f MiB in %s", items, about, size / 2**20, out)
            parts.prepare()
        _barrier()
        missing = parts.missing()
        if rank == 0 and missing and exact:
            require_room(out, size * len(missing) / number + size)  # the parts stay until they have become one
        _require_alike(parts, run, compared, block, group_of)
        _barrier()  # all know what is missing before one fills it
        for place, arrays in _blocks(items, run, missing[rank::ranks], block):
            parts.write(place, arrays)
        _barrier()
        if rank == 0:
            parts.finish()
        _barrier()
    return replace(Features.open(out), **{name: value for name, value in facts.items() if value is not None})


def _blocks(items: int, run: Pass, blocks: Sequence[int], block: int) -> Iterator[tuple[int, Arrays]]:
    """The rows of some blocks of the items, block by block."""
    wanted = [range(place * block, min((place + 1) * block, items)) for place in blocks]
    pieces = run([item for items in wanted for item in items]) if wanted else iter(())
    with _bar(sum(map(len, wanted))) as bar:
        for place, chosen in zip(blocks, wanted, strict=True):
            done, found = 0, []
            while done < len(chosen):
                number, arrays = next(pieces)
                done += number
                found.append(arrays)
                bar.update(number)
            yield place, _joined(found)


def _joined(pieces: Sequence[Mapping[str, Any]]) -> Arrays:
    return {name: np.concatenate([np.asarray(piece[name]) for piece in pieces]) for name in pieces[0]}


def trunk_digest(model: nn.Module, *left_out: str) -> str:
    """SHA-256 of all tensors of a network but those of some parts, wherever DDP or ``torch.compile`` wraps it."""
    return _digest(plain_names(frozen_tensors(model, left_out)))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps(fingerprints(dict(tensors)), sort_keys=True).encode()).hexdigest()


def _find(model: nn.Module, classifier: str | nn.Module | None) -> tuple[str, nn.Module | None]:
    if classifier is None:
        return "", None
    for name, module in model.named_modules():
        if classifier in (name, module):
            return name, module
    raise InputError(f"expected a module of the model as classifier, got {classifier!r}; see model.named_modules()")


@contextmanager
def _input_of(layer: nn.Module | None) -> Iterator[list[Any]]:
    """What the layer is called with, call by call."""
    seen: list[Any] = []
    if layer is None:
        yield seen
        return

    def keep(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(iter((*inputs, *named.values())), None)
        # A copy: the layer may write to it.
        seen.append(first.detach().clone() if isinstance(first, Tensor) else first)

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _only(seen: list[Any], name: str) -> Any:
    if len(seen) != 1:
        raise InputError(
            f"expected the classifier {name!r} to run once on a batch, but it ran {len(seen)} times; name one that "
            "does, of a model that is not compiled"
        )
    return seen[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(loader: DataLoader[Any], chosen: Sequence[int]) -> tuple[list[list[int]], DataLoader[Any]]:
    """The rows in batches as the loader's, none of rows of two blocks, and what loads them."""
    size = loader.batch_size or int(getattr(loader.batch_sampler, "batch_size", 1))
    batches = batched(chosen, size)
    workers = loader.num_workers if len(batches) > 1 else 0
    return batches, DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
    )


def batched(items: Sequence[int], size: int, block: int = BLOCK) -> list[list[int]]:
    """Items in their order in batches, none of items of two blocks."""
    blocks = [list(some_items) for _, some_items in itertools.groupby(items, lambda item: item // block)]
    return [found[start : start + size] for found in blocks for start in range(0, len(found), size)]


def _as_rows(features: Any, labels: Tensor) -> Tensor:
    """(n, d), or pooled features (n, d, 1, 1), as (n, d)."""
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) < 2 or shape[0] != len(labels) or labels.dim() != 1 or any(size != 1 for size in shape[2:]):
        raise InputError(
            f"expected features of shape (n, d) and n labels, got {shape} and {tuple(labels.shape)}; name the "
            "classifier whose input they are, or pool them"
        )
    return cast(Tensor, features).flatten(1)


def rank_and_number() -> tuple[int, int]:
    """Rank and number of the processes of distributed training."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if rank_and_number()[1] > 1:
        dist.barrier()


@contextmanager
def _bar(items: int) -> Iterator[Any]:
    quiet = rank_and_number()[0] > 0 or not sys.stderr.isatty()
    with tqdm(total=items, desc="features", unit="example", disable=quiet) as bar:
        yield bar


def _require_alike(
    parts: Parts, run: Pass, compared: Sequence[int], block: int, group_of: Callable[[int], int] | None
) -> None:
    """Refuse stored rows that this pass does not find again, but for what devices and mixed precision round."""
    whole = read_arrays(parts.folder)[0] if (parts.folder / RECORD).exists() else None
    for item in compared:
        arrays: Any = parts.read(item // block) if whole is None else whole
        if arrays is None:
            continue
        place = item % block if whole is None else item
        rows = slice(place, place + 1) if group_of is None else arrays["groups"] == group_of(item)
        x, y = arrays["x"][rows].astype(np.float32), arrays["y"][rows]
        ((_, found),) = run([item])
        same = found["x"].shape == x.shape and found["y"].tolist() == y.tolist()
        if not (same and np.allclose(x, found["x"], rtol=0.05, atol=0.05 * float(np.abs(x).max(initial=0)))):
            raise InputError(
                f"expected the features and labels in {str(parts.folder)!r} to come out again, but some differ: other "
                "images, labels or transforms; give another folder, or delete this one"
            )
