import subprocess
import sys


def test_classification_imports_no_other_framework():
    program = (
        "import sys, disalign_cls, disalign_cls.train, disalign_cls.test, disalign_cls.predict, disalign_cls.check;"
        "print({name.split('.')[0] for name in sys.modules} & {'mmseg', 'mmcv', 'detectron2', 'mmdet', 'mmpretrain'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["set()"], done.stderr
