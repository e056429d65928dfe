from setuptools import find_packages, setup

# Metadata is in pyproject.toml; the shipped configs are data of a package of their own, found by name once installed.
setup(
    packages=[*find_packages(include=["disalign", "disalign.*", "disalign_*"]), "disalign_configs"],
    package_dir={"disalign_configs": "configs"},
)
