"""One pass of a frozen network over a data set, kept: what its classifier sees."""

import datetime
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.hub import tqdm  # the real one where it is installed
from torch.utils.data import DataLoader, Subset

from .counts import ClassCounts, load_class_counts
from .errors import InputError, some
from .features import DTYPES, Features, require_finite_rows
from .freezing import fingerprints, frozen_tensors
from .functional import check_labels
from .hand_over import plain_names
from .io import locked_folder, require_folder
from .io.arrays import BLOCK, Arrays, Filling, Shapes, number_of_blocks
from .io.images import MOST_CLASSES

log = logging.getLogger("disalign")

#: Rows that a pass into a folder compares with what is there.
SAMPLE = 16

#: Runs a model on a batch; from both to the batch's labels (n,) and the model's output.
Step = Callable[[nn.Module, Any], tuple[Tensor, Any]]
#: From rows of the data set to pieces of it in that order: where in the rows, features (n, d), labels (n,).
Pass = Callable[[Sequence[int]], Iterator[tuple[int, Tensor, Tensor]]]


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
    """Run a network once over a data set and keep what its classifier sees, row by row in the data set's order.

    The network runs in eval mode and without gradients, on the device it is on, under the autocast that is on. In
    distributed training each rank takes a share, and all get the whole.

    Args:
        model: any trained network.
        loader: its data set, batch size, workers and collation count; its order does not.
        classifier: the module whose input is the feature, or its name; default: the model's output is the feature.
        out: folder to keep them in, for sets that do not fit in memory (N x d x 2 or 4 bytes), and for later. A killed
            pass goes on there; a whole one of the same trunk and data is opened, and the network does not run.
        dtype: of the features kept.
        class_counts, weights, groups: :meth:`Features.from_arrays`'s.
        step: what runs the model on a batch.
        data: says what list and transforms the rows are from; compared, as the trunk's tensors are, when ``out`` is
            used again. Default: the data set's repr.
        random: the data set draws random transforms, so that no two passes agree.

    Raises:
        InputError: no such classifier; features that are not (n, d), or not finite (the rows are named); labels out of
            range; no room for ``out``; or features of another trunk or of other data in it.
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
    known = {"weights": given.weights.numpy()} | ({} if given.groups is None else {"groups": given.groups.numpy()})
    counts = None if class_counts is None else load_class_counts(class_counts)
    num_labels = MOST_CLASSES if counts is None else len(counts)
    with _input_of(layer) as seen, _evaluating(model):

        @torch.no_grad()
        def run(chosen: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
            done = 0
            batches = _batches(loader, chosen)
            for batch in batches:
                seen.clear()
                labels, output = step(model, batch)
                labels = check_labels(torch.as_tensor(labels).cpu(), num_labels, ignore_index=None)
                x = _as_rows(_only(seen, name) if layer else output, labels).to("cpu", dtype)
                asked = min(batches.batch_size or 1, len(chosen) - done)
                if len(x) != asked:
                    raise InputError(
                        f"expected {asked} examples in a batch, got {len(x)}; let the collate function keep all"
                    )
                require_finite_rows(x, chosen[done])
                yield done, x, labels
                done += len(x)

        # Spread over the set: they tell another list or transform from the one that a folder was filled with.
        sampled = [0] if out is None else sorted({place * (rows - 1) // (SAMPLE - 1) for place in range(SAMPLE)})
        found = [(x, y) for _, x, y in run(sampled)]
        sample, sample_labels = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
        shapes = {"x": (sample.numpy().dtype, sample.shape[1]), "y": (np.dtype(np.int64),)}
        shapes |= {key: (array.dtype, *array.shape[1:]) for key, array in known.items()}
        source = {
            "trunk": trunk_digest(model, name),
            "classifier": name,
            # Objects without a repr of their own show their address.
            "data": re.sub(r" at 0x[0-9a-f]+", "", repr(loader.dataset)) if data is None else data,
            "weights or groups": _digest({key: torch.from_numpy(array) for key, array in known.items()}),
            "class_counts": None if counts is None else counts.tolist(),
        }
        made = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, **source}
        if out is not None:
            facts = {"source": source, "class_counts": source["class_counts"], "provenance": made}
            require_folder(out)
            compared = None if random else (sampled, sample, sample_labels)
            _in_folder(Filling(out, rows, shapes, facts, _place()[0]), compared, known, run)
            return Features.open(out)
        arrays = known | _in_memory(rows, shapes, run)
    tensors: dict[str, Any] = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return Features.from_arrays(**tensors, class_counts=counts, provenance=made)


def trunk_digest(model: nn.Module, classifier: str = "") -> str:
    """SHA-256 of all tensors of a network but its classifier's, wherever DDP or ``torch.compile`` wraps it."""
    return _digest(plain_names(frozen_tensors(model, [classifier])))


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
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(loader: DataLoader[Any], chosen: Sequence[int]) -> DataLoader[Any]:
    size = loader.batch_size or int(getattr(loader.batch_sampler, "batch_size", 1))
    workers = loader.num_workers if len(chosen) > size else 0
    return DataLoader(
        Subset(loader.dataset, chosen),
        batch_size=size,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
    )


def _as_rows(features: Any, labels: Tensor) -> Tensor:
    """(n, d), or pooled features (n, d, 1, 1), as (n, d)."""
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) < 2 or shape[0] != len(labels) or labels.dim() != 1 or any(size != 1 for size in shape[2:]):
        raise InputError(
            f"expected features of shape (n, d) and n labels, got {shape} and {tuple(labels.shape)}; name the "
            "classifier whose input they are, or pool them"
        )
    return cast(Tensor, features).flatten(1)


def _place() -> tuple[int, int]:
    """Rank and number of the processes of distributed training."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if _place()[1] > 1:
        dist.barrier()


def _share(blocks: Sequence[int], rows: int) -> list[int]:
    """The rows of those of the blocks that fall to this rank."""
    rank, ranks = _place()
    return [row for block in blocks[rank::ranks] for row in range(block * BLOCK, min((block + 1) * BLOCK, rows))]


@contextmanager
def _bar(rows: int, total: int, width: int) -> Iterator[Any]:
    quiet = _place()[0] > 0 or not sys.stderr.isatty()
    with tqdm(total=rows, desc=f"{total:,} x {width} features", unit="row", disable=quiet) as bar:
        yield bar


def _in_memory(rows: int, shapes: Shapes, run: Pass) -> dict[str, Any]:
    chosen = _share(range(number_of_blocks(rows)), rows)
    arrays = {name: np.zeros((len(chosen), *shapes[name][1:]), shapes[name][0]) for name in ("x", "y")}
    with _bar(len(chosen), rows, shapes["x"][1]) as bar:
        for start, x, y in run(chosen) if chosen else ():
            arrays["x"][start : start + len(x)], arrays["y"][start : start + len(x)] = x.numpy(), y.numpy()
            bar.update(len(x))
    if _place()[1] == 1:
        return arrays
    parts: list[Any] = [None] * _place()[1]
    dist.all_gather_object(parts, (chosen, arrays))
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return {name: np.concatenate([part[name] for _, part in parts])[order] for name in arrays}


def _in_folder(
    filling: Filling, compared: tuple[list[int], Tensor, Tensor] | None, known: Mapping[str, Any], run: Pass
) -> None:
    first = filling.rank == 0
    with locked_folder(filling.folder, "out") if first else nullcontext():
        if first:
            log.info("features of %d rows take %.0f MiB in %s", filling.rows, filling.size() / 2**20, filling.folder)
            filling.prepare(known)
        _barrier()
        arrays, missing = filling.open("r+"), filling.missing()
        if compared is not None:
            _require_alike(arrays, missing, *compared, filling.folder)
        _barrier()  # all know what is missing before one fills it
        chosen = _share(missing, filling.rows)
        with _bar(len(chosen), filling.rows, arrays["x"].shape[1]) as bar:
            for start, x, y in run(chosen) if chosen else ():
                rows = chosen[start : start + len(x)]
                arrays["x"][rows], arrays["y"][rows] = x.numpy(), y.numpy()
                for row in rows:
                    if (row + 1) % BLOCK == 0 or row + 1 == filling.rows:
                        filling.filled(arrays, row // BLOCK)
                bar.update(len(x))
        _barrier()
        if first:
            filling.finish()
        _barrier()


def _require_alike(
    arrays: Arrays, missing: Sequence[int], rows: Sequence[int], x: Tensor, y: Tensor, folder: Path
) -> None:
    """Refuse stored rows that this pass does not find again, but for what devices and mixed precision round."""
    places = [place for place, row in enumerate(rows) if row // BLOCK not in missing]
    chosen = [rows[place] for place in places]
    stored, found = torch.from_numpy(arrays["x"][chosen]).float(), x[places].float()
    close = not places or torch.allclose(stored, found, rtol=0.05, atol=0.05 * float(stored.abs().max()))
    if not close or arrays["y"][chosen].tolist() != y[places].tolist():
        raise InputError(
            f"expected the features and labels in {str(folder)!r} to come out again, but some differ: other images, "
            "labels or transforms; give another folder, or delete this one"
        )
