"""A dataset's annotations as its own pipeline loads them, with one-sentence errors."""

from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadAnnotations, LoadImageFromFile, TestTimeAug
from mmengine.dataset import ClassBalancedDataset, Compose, ConcatDataset, RepeatDataset
from mmseg.datasets import MultiImageMixDataset

from disalign.errors import InputError, first_line, in_user_code
from disalign.io.files import refuse_special
from disalign.io.images import require_labels


def plain_datasets(dataset: Any) -> list:
    """The datasets within wrappers, each as often as it is listed, without a wrapper's repetitions."""
    if isinstance(dataset, ConcatDataset):
        return [plain for part in dataset.datasets for plain in plain_datasets(part)]
    if isinstance(dataset, (RepeatDataset, ClassBalancedDataset, MultiImageMixDataset)):
        return plain_datasets(dataset.dataset)
    if not hasattr(dataset, "get_data_info") or not hasattr(getattr(dataset, "pipeline", None), "transforms"):
        raise InputError(
            "expected a dataset like mmengine's BaseDataset, or mmengine's or mmsegmentation's wrappers around some, "
            f"got {type(dataset).__name__}; give class counts as a JSON file"
        )
    return [dataset]


def class_names(dataset: Any) -> list[str]:
    """The names of a dataset's classes; empty if it has none."""
    return list(dataset.metainfo.get("classes") or ())


class Guarded:
    """A loading transform that reports bad files and labels in one sentence with the file's name.

    It refuses a missing or broken file, anything but one label per pixel, an annotation of another size than its image
    (if that is loaded), and labels outside [0, K) that are not ignored: these would be an index error in the loss, or
    go unnoticed in the evaluation.
    """

    def __init__(self, loader: Any, num_classes: int, ignore_index: int) -> None:
        self.loader = loader
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __call__(self, results: dict) -> Any:
        is_annotation = isinstance(self.loader, LoadAnnotations)
        what, key = ("annotation", "seg_map_path") if is_annotation else ("image", "img_path")
        path = results.get(key)
        if path is None:
            raise InputError(f"expected an {what} for {results.get('img_path')!r}, but the dataset names none")
        refuse_special(path, f"an {what}")
        try:
            loaded = self.loader(results)
        except FileNotFoundError:
            raise InputError(f"expected an {what} at {path!r}, but there is no such file") from None
        except Exception as error:  # a broken file can raise anything in a reader
            if in_user_code(error):
                error.add_note(f"while loading {path!r}")
                raise
            raise InputError(
                f"expected an {what} that can be read at {path!r}, but: {first_line(error)}; is it whole?"
            ) from error
        if is_annotation and "gt_seg_map" in results:
            self._check(results["gt_seg_map"], results)
        return loaded

    def __repr__(self) -> str:
        return repr(self.loader)

    def _check(self, labels, results):
        path, size = results["seg_map_path"], tuple(results.get("ori_shape", labels.shape)[:2])
        if labels.shape != size:
            raise InputError(
                f"expected one label per pixel, an array of shape {size}, in {path!r}, got {labels.shape}; is it a "
                f"grey-scale image, and that of {results.get('img_path')!r}?"
            )
        shifted = " (as loaded: reduce_zero_label takes 1 off)" if results.get("reduce_zero_label") else ""
        require_labels(labels, self.num_classes, self.ignore_index, path, shifted)


def guard(dataset: Any, num_classes: int, ignore_index: int = 255) -> None:
    """Put :class:`Guarded` around a dataset's loading transforms, in place, before a data loader starts its workers."""
    for plain in plain_datasets(dataset):
        for transforms in _steps(plain.pipeline):
            for place, transform in enumerate(transforms):
                if isinstance(transform, (LoadAnnotations, LoadImageFromFile)):
                    transforms[place] = Guarded(transform, num_classes, ignore_index)


def loader_of(dataset: Any, kind: type) -> Any:
    """The first transform of this kind in a plain dataset's pipeline, without its guard, or ``None``."""
    found = (getattr(one, "loader", one) for transforms in _steps(dataset.pipeline) for one in transforms)
    return next((one for one in found if isinstance(one, kind)), None)


def _steps(pipeline: Compose) -> Iterator[list]:
    """The lists of transforms in a pipeline: its own, and those within test-time augmentation."""
    yield pipeline.transforms
    for transform in pipeline.transforms:
        if isinstance(transform, TestTimeAug):
            for inner in transform.subroutines:
                yield from _steps(inner)
