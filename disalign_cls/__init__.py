"""Long-tailed image classification on MMEngine's Runner: stage one, and DisAlign as stage two."""

from . import classifiers, datasets, hooks, metrics, samplers  # noqa: F401  (importing registers them)
