"""A tiny set and a short stage one and two over it, made once for all tests."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def unformatted():
    """MMEngine has a run's config formatted three times over, which takes longer than a tiny run itself."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("yapf"):
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True)
def scope():
    """Names are looked up as within a segmentation run, whatever ran before in this process."""
    if find_spec("mmseg") is None:
        yield
        return
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


@pytest.fixture(scope="session")
def ade(tmp_path_factory):
    """The folder of a generated set of 150 classes."""
    from .runs import make_ade

    folder = tmp_path_factory.mktemp("ade") / "data"
    make_ade(folder)
    return folder


@pytest.fixture(scope="session")
def configs(ade, tmp_path_factory):
    """Configs over it, see :func:`runs.write_configs`."""
    from .runs import write_configs

    return write_configs(tmp_path_factory.mktemp("configs"), ade)


@pytest.fixture(scope="session")
def stage_one(configs, tmp_path_factory):
    """The checkpoint of a short stage one, as stock MMEngine saves it."""
    from .runs import train

    folder = tmp_path_factory.mktemp("stage_one")
    assert train(configs.one, folder) == 0
    return folder / "iter_8.pth"


@pytest.fixture(scope="session")
def stage_two(configs, stage_one, tmp_path_factory):
    """The checkpoint of a short stage two, validated twice on its way."""
    from .runs import train

    folder = tmp_path_factory.mktemp("stage_two")
    assert train(configs.two, folder, f"stage_one={stage_one}") == 0
    return folder / "iter_4.pth"
