from setuptools import find_packages, setup

# Metadata is in pyproject.toml. The shipped configs are data of a package of their own, found by name after installation.
setup(
    packages=[*find_packages(include=["disalign", "disalign.*", "disalign_*"]), "disalign_configs"],
    package_dir={"disalign_configs": "configs"},
)
