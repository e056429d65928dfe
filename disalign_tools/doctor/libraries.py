"""The libraries, and the code that each must run."""

from __future__ import annotations

from typing import NamedTuple

#: Part -> the libraries whose presence means that it is installed; the core must always work.
PARTS = dict(core="", cls="mmengine timm", mmseg="mmseg", d2="detectron2", tools="PIL tqdm", export="onnx")


class Library(NamedTuple):
    """A library to try; names in one string are separated by blanks."""

    name: str  # the module to import, or what the report calls ``code``
    parts: str
    distributions: str = ""  # any of these provides it; the first is the one to install
    needs: str = ""  # libraries, listed before it, that are to blame first if it fails
    code: str = ""  # what must run; it may set ``value``, which the report shows, and raise UserWarning for a note


CUDA = """
import shutil, torch
value = "no GPU, everything runs on the CPU"
if torch.cuda.is_available():
    devices = range(torch.cuda.device_count())
    for i in devices:
        (torch.ones(2, device=f"cuda:{i}") + 1).sum().item()
    value = f"{torch.version.cuda or torch.version.hip}, {', '.join(map(torch.cuda.get_device_name, devices))}"
elif shutil.which("nvidia-smi"):
    try:
        torch.cuda.init()
    except Exception as error:
        raise UserWarning(f"torch {torch.__version__} cannot use the GPU: {error}")
"""
NMS = "import torch, torchvision; torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)"
# Every run starts with this; it imports torchvision where there is one.
RUNS = "import mmengine.runner; mmengine.utils.dl_utils.collect_env()"
OPERATORS = """
import mmcv
try:
    import mmcv._ext
except ImportError as error:
    raise UserWarning(f"CCHead, PSAHead, PointHead and SANHead need an mmcv with operators: {error}")
"""
DETECTRON2 = "import detectron2._C, detectron2.modeling, detectron2.model_zoo"
LVIS = """
import inspect, lvis.eval
if "np.float)" in inspect.getsource(lvis.eval):
    raise UserWarning("LVISEval uses np.float, which numpy 1.24 removed; our own evaluation does not need it")
"""
OPENCV = "opencv-python-headless opencv-python opencv-contrib-python-headless opencv-contrib-python"

LIBRARIES = [
    Library("numpy", "core", "numpy"),
    Library("tqdm", "cls mmseg d2 tools", "tqdm"),
    Library("torch", "core", "torch", "numpy tqdm"),
    Library("CUDA", "core", "", "torch", CUDA),
    Library("disalign", "core", "", "numpy torch"),
    Library("PIL", "cls mmseg d2 tools", "pillow", "", "import PIL.Image"),
    Library("cv2", "cls mmseg d2", OPENCV, "numpy"),
    Library("torchvision", "cls d2", "torchvision", "numpy PIL torch", NMS),
    Library("timm", "cls", "timm", "torch torchvision"),
    Library("mmengine", "cls mmseg", "onedl-mmengine mmengine", "numpy PIL torch cv2 torchvision", RUNS),
    Library("sklearn", "cls", "scikit-learn", "numpy", "import sklearn.datasets"),
    Library("matplotlib", "cls d2", "matplotlib", "numpy PIL", "import matplotlib.figure"),
    Library("tensorboard", "cls", "tensorboard", "numpy PIL torch", "import torch.utils.tensorboard"),
    Library("disalign_cls", "cls", "", "disalign timm mmengine"),
    Library("mmcv", "mmseg", "onedl-mmcv mmcv mmcv-lite", "numpy PIL cv2 mmengine", OPERATORS),
    Library("mmseg", "mmseg", "onedl-mmsegmentation mmsegmentation", "PIL torchvision timm mmcv", "import mmseg.apis"),
    Library("disalign_mmseg", "mmseg", "", "disalign mmseg"),
    Library("fvcore", "d2", "fvcore", "numpy PIL torch", "import fvcore.common.config"),
    Library("pkg_resources", "d2", "setuptools"),
    Library("detectron2", "d2", "detectron2", "numpy PIL tqdm cv2 torchvision fvcore pkg_resources", DETECTRON2),
    Library("faster_coco_eval", "d2", "faster-coco-eval", "numpy cv2"),
    Library("lvis", "d2", "lvis", "numpy PIL cv2 matplotlib", LVIS),
    Library("disalign_d2", "d2", "", "disalign detectron2"),
    Library("disalign_tools", "tools", "", "disalign PIL tqdm", "import disalign_tools.count_classes"),
    Library("onnx", "export", "onnx", "numpy"),
    Library("onnxscript", "export", "onnxscript", "numpy onnx"),
    Library("onnxruntime", "export", "onnxruntime onnxruntime-gpu", "numpy"),
]
