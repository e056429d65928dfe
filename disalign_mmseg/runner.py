"""The Runner of :mod:`disalign_mmengine`, with one-sentence errors for broken files of datasets."""

from typing import Any

from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from disalign_mmengine.runner import DisAlignRunner

from .annotations import guard
from .data_check import build_dataset


@RUNNERS.register_module()
class DisAlignSegRunner(DisAlignRunner):
    """:class:`disalign_mmengine.runner.DisAlignRunner` for segmentation (``runner_type = "DisAlignSegRunner"``)."""

    starts_from_others = True

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """MMEngine's, with one-sentence errors for broken files and wrong labels of the dataset."""
        if isinstance(dataloader, dict):
            dataset = dataloader["dataset"]
            dataset = build_dataset(dataset) if isinstance(dataset, dict) else dataset
            if classes := getattr(dataset, "metainfo", {}).get("classes"):
                guard(dataset, len(classes), getattr(dataset, "ignore_index", 255))
            dataloader = dict(dataloader, dataset=dataset)
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)
