from pathlib import Path

from setuptools import find_packages, setup

CLS = [
    "onedl-mmengine>=0.10.10",
    "torchvision>=0.21",
    "timm>=1.0.9",
    "scikit-learn>=1.4",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "tqdm>=4.60",
    "opencv-python-headless>=4.9",  # mmengine imports it but does not ask for it
]
MMSEG = ["onedl-mmengine>=0.10.10", "onedl-mmcv>=2.3.6", "onedl-mmsegmentation>=1.4.2", "onedl-mim>=0.5.1"]
# Beside detectron2 itself, which is on no registry. fvcore: configs with several bases. setuptools: detectron2's model
# zoo imports pkg_resources, which 82 removed.
D2 = ["faster-coco-eval>=1.8", "lvis>=0.5.3", "fvcore>=0.1.5.post20221221", "setuptools>=80,<82"]
TOOLS = ["pillow>=10", "tqdm>=4.60"]  # to count classes
# For disalign_cls.export to ONNX, and to check what it wrote.
EXPORT = ["onnx>=1.18", "onnxscript>=0.4", "onnxruntime>=1.20"]
SKLEARN = ["scikit-learn>=1.6"]
TEST = [*CLS, *SKLEARN, *MMSEG, *TOOLS, *EXPORT, "pytest>=8"]

setup(
    name="disalign",
    version="0.1.0",
    description="DisAlign (CVPR 2021): a short second stage for long-tailed recognisers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="long-tail recognition classification detection segmentation calibration",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["disalign", "disalign.*", "disalign_*"]), "disalign_configs"],
    # The shipped configs are data of a package of their own, found by name after installation.
    package_dir={"disalign_configs": "configs"},
    package_data={"disalign": ["data/*.json", "py.typed"], "disalign_configs": ["**/*.py", "**/*.yaml"]},
    entry_points={"console_scripts": ["disalign = disalign_tools.__main__:main"]},
    install_requires=["torch>=2.6", "numpy>=1.26"],
    extras_require={
        "cls": CLS,
        "mmseg": MMSEG,
        "d2": D2,
        "tools": TOOLS,
        "export": EXPORT,
        "sklearn": SKLEARN,
        "test": TEST,
        "all": sorted({*CLS, *MMSEG, *D2, *TEST}),
    },
)
