"""Long-tailed image classification on MMEngine's Runner: stage one, and DisAlign as stage two."""

try:
    from . import classifiers, datasets, hooks, metrics, optim, samplers  # noqa: F401  (importing registers them)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"disalign_cls needs mmengine, timm, torchvision and more, but there is no {error.name}; install them with "
        "pip install 'disalign[cls]', or one by one beside an upstream mmengine",
        name=error.name,
    ) from error
