"""Reads a pickle of numpy arrays without letting the file call anything.

The names that such a pickle asks for get stand-ins below; any other name is refused. numpy's own are not safe: its
dtype takes flags from the file that make it follow numbers as pointers.

:func:`records_left_out` does the like for what training loops leave beside the tensors in torch's files.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, ClassVar, Self

import numpy as np
import torch


class _Dtype:
    """For ``numpy.dtype``: the code and the byte order of a plain number, nothing else from the file."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(code if isinstance(code, str) else "O")
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """For ``numpy.ndarray``, built from its bytes."""

    def __init__(self, *_: Any) -> None:
        self.array: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if fortran else "C").array


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    whole = _Array()
    data = data.encode("latin1") if isinstance(data, str) else data
    whole.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order).astype(dtype.dtype.newbyteorder("="))
    return whole


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_buffer(data, dtype, (), "C").array.item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text to encode as {encoding!r}")
    return text.encode("latin1")


class _Call:
    """A function that a pickle can call but not alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("it alters what it is read with")


class _Unpickler(pickle._Unpickler):  # the one in C takes memory for as many records as a file claims to have
    stand_ins: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "scalar"): _Call(_scalar),
        ("numpy._core.numeric", "_frombuffer"): _Call(_from_buffer),
        ("collections", "OrderedDict"): dict,
        ("_codecs", "encode"): _Call(_encode),
        ("builtins", "bytes"): _Call(lambda: b""),  # as protocol 2 writes it
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.stand_ins[module.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}") from None


def load_arrays(file: IO[bytes]) -> Any:
    """Unpickle numpy arrays of numbers, as tensors, plain values and builtin containers from a binary file.

    Raises:
        pickle.UnpicklingError: it holds anything else; nothing of it was called.
    """
    return _as_tensors(_Unpickler(file, encoding="latin1").load())


def _as_tensors(value: Any, done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    # What a file holds many times over is turned once: a few bytes can nest beyond all memory.
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, _Array):
        turned: Any = torch.from_numpy(value.array)
    elif isinstance(value, Mapping):
        turned = {key: _as_tensors(item, done) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        turned = type(value)(_as_tensors(item, done) for item in value)
    else:
        return value
    done[id(value)] = value, turned
    return turned


class _Dropped:
    """Stands in for an object that nobody needs: built from anything, it keeps nothing."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


# The real getattr and the real numpy would let a file do harm; a stand-in under their names can't.
_RECORDS = (
    "argparse.Namespace",  # the command line, as many training scripts save it
    "builtins.getattr",
    "__builtin__.getattr",
    # A best accuracy and the like; where numpy 1 and 2 keep it.
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int64")),
)


@contextmanager
def records_left_out(names: Iterable[str]) -> Iterator[None]:
    """Within it ``torch.load(weights_only=True)`` takes files with such objects, and leaves the objects out.

    ``names`` are the full names of classes (a framework's log buffers); if there are any, a script's arguments and
    numpy's scalars are left out too. Without names nothing changes.
    """
    records: list[Any] = [(_Dropped, name) for name in (*names, *_RECORDS)] if names else []
    with torch.serialization.safe_globals(records):
        yield
