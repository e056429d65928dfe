"""Long-tailed image classification on MMEngine's Runner: stage one, and DisAlign as stage two."""

try:
    import disalign_mmengine  # noqa: F401  (importing registers)

    from . import classifiers, datasets, hooks, losses, metrics, samplers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"disalign_cls needs mmengine, timm, torchvision and more, but there is no {error.name}; install them with "
        "pip install 'disalign[cls]', or individually beside an upstream mmengine",
        name=error.name,
    ) from error
