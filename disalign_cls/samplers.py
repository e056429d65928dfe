"""Class-aware samplers of Decoupling (Kang et al., 2020): p_j proportional to n_j^q."""

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS
from torch import Tensor

from disalign.errors import InputError


@DATA_SAMPLERS.register_module()
class PowerSampler(DefaultSampler):
    """Draw class j with probability n_j^q / sum_i n_i^q, then one of its images uniformly.

    An epoch draws as many images as the dataset has.

    q = 1 is instance-balanced (then every image once, without replacement), q = 1/2 square-root, q = 0 class-balanced.
    Seed and epoch determine one order for all ranks, which take turns; each rank gets equally many.

    Args:
        dataset: with ``labels`` (N,) and ``class_counts`` (K,).
        q: in [0, 1].
        seed: of the order; default: one random number shared by all ranks.

    Raises:
        InputError: q outside [0, 1].
    """

    def __init__(self, dataset: Any, q: float = 1.0, seed: int | None = None) -> None:
        if not 0 <= q <= 1:
            raise InputError(f"expected q in [0, 1] (1 instance-balanced, 0 class-balanced), got {q}")
        super().__init__(dataset, seed=seed)
        self.q = q

    def class_probabilities(self) -> Tensor:
        """(K,) fp64 p_j of this epoch; 0 for a class without images."""
        return self._power(self.q)

    def _power(self, q: float) -> Tensor:
        counts = self.dataset.class_counts.double()
        powers = torch.where(counts > 0, counts**q, 0.0)
        return powers / powers.sum()

    def __iter__(self) -> Iterator[int]:
        per_image = (self.class_probabilities() / self.dataset.class_counts.double())[self.dataset.labels]
        if torch.allclose(per_image, per_image[:1], rtol=1e-9, atol=0):
            return super().__iter__()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.multinomial(per_image, self.total_size, replacement=True, generator=generator)
        return iter(order[self.rank :: self.world_size].tolist())


@DATA_SAMPLERS.register_module()
class ProgressivelyBalancedSampler(PowerSampler):
    """p_j(t) = (1 - t/T) p_j^IB + (t/T) p_j^CB: from instance-balanced in the first epoch towards class-balanced.

    Args:
        dataset, seed: :class:`PowerSampler`'s.
        max_epochs: T, the epochs of the run; t = 0 .. T - 1.
    """

    def __init__(self, dataset: Any, max_epochs: int, seed: int | None = None) -> None:
        super().__init__(dataset, seed=seed)
        if max_epochs < 1:
            raise InputError(f"expected max_epochs >= 1, got {max_epochs}")
        self.max_epochs = max_epochs

    def class_probabilities(self) -> Tensor:
        share = self.epoch / self.max_epochs
        return (1 - share) * self._power(1.0) + share * self._power(0.0)
