"""Every decode head that can be calibrated, and those that can't."""

import copy
import pickle
from importlib.util import find_spec

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.models import decode_heads as stock
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import disalign_mmseg
from disalign import InputError, freeze_except
from disalign_mmseg import DisAlignHead, calibrated
from disalign_mmseg.decode_heads import HEADS, REFUSED

#: A config of mmseg's own for each head.
SOURCES = {
    "ANNHead": "_base_/models/ann_r50-d8.py",
    "APCHead": "_base_/models/apcnet_r50-d8.py",
    "ASPPHead": "_base_/models/deeplabv3_r50-d8.py",
    "CCHead": "_base_/models/ccnet_r50-d8.py",
    "DAHead": "_base_/models/danet_r50-d8.py",
    "DMHead": "_base_/models/dmnet_r50-d8.py",
    "DNLHead": "_base_/models/dnl_r50-d8.py",
    "DPTHead": "_base_/models/dpt_vit-b16.py",
    "DepthwiseSeparableASPPHead": "_base_/models/deeplabv3plus_r50-d8.py",
    "DepthwiseSeparableFCNHead": "_base_/models/fast_scnn.py",
    "EMAHead": "_base_/models/emanet_r50-d8.py",
    "EncHead": "_base_/models/encnet_r50-d8.py",
    "FCNHead": "_base_/models/fcn_r50-d8.py",
    "FPNHead": "_base_/models/fpn_r50.py",
    "GCHead": "_base_/models/gcnet_r50-d8.py",
    "ISAHead": "_base_/models/isanet_r50-d8.py",
    "LRASPPHead": "_base_/models/lraspp_m-v3-d8.py",
    "LightHamHead": "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py",
    "NLHead": "_base_/models/nonlocal_r50-d8.py",
    "OCRHead": "_base_/models/ocrnet_r50-d8.py",
    "PSAHead": "_base_/models/psanet_r50-d8.py",
    "PSPHead": "_base_/models/pspnet_r50-d8.py",
    "SETRMLAHead": "_base_/models/setr_mla.py",
    "SETRUPHead": "_base_/models/setr_naive.py",
    "SegformerHead": "_base_/models/segformer_mit-b0.py",
    "UPerHead": "_base_/models/upernet_r50.py",
}
COMPILED = ("CCHead", "PSAHead")


def head_config(name):
    """mmseg's own, with BatchNorm for SyncBN; the sizes of the features that it takes."""
    config = Config.fromfile(disalign_mmseg.mmseg_config(SOURCES[name])).model.decode_head
    config = copy.deepcopy(config[-1] if isinstance(config, (list, tuple)) else config).to_dict()

    def with_batch_norm(value):
        if isinstance(value, dict):
            return {key: "BN" if entry == "SyncBN" else with_batch_norm(entry) for key, entry in value.items()}
        return value

    return with_batch_norm(config)


def features_for(config, size=8):
    """Random features of every level, coarser by 2 from level to level where a head takes several."""
    if config["type"].endswith("DPTHead"):
        channels = config["embed_dims"]
        return [[torch.randn(1, channels, 4, 4), torch.randn(1, channels)] for _ in config["in_index"]]
    channels, levels = config["in_channels"], config.get("in_index", -1)
    if isinstance(channels, int):
        channels, levels = [channels], [levels]
    last = max(0, *levels)
    if levels == [-1]:
        return [torch.randn(1, channels[0], size, size)]
    # DeepLabV3+ looks at the first level too.
    features = [torch.randn(1, config.get("c1_in_channels", 1), 2 * size, 2 * size) for _ in range(last + 1)]
    pyramid = config["type"].endswith(("UPerHead", "FPNHead", "SegformerHead", "LightHamHead"))
    size = 64 if config["type"].endswith("LRASPPHead") else size  # it pools over 49 x 49
    for place, (level, width) in enumerate(zip(levels, channels, strict=True)):
        shrunk = size >> place if pyramid else size
        features[level] = torch.randn(1, width, shrunk, shrunk)
    return features


def scores(head, features, config):
    arguments = [features]
    if config["type"].endswith("OCRHead"):
        arguments.append(torch.randn(1, config["num_classes"], 8, 8, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(2)  # LightHamHead draws its bases in every forward
    # Some heads overwrite what they are given.
    output = head(*copy.deepcopy(arguments))
    return output[0] if isinstance(output, tuple) else output


def pair(name):
    """A stock head and its calibrated form with the same tensors, both in eval mode; and features for them."""
    if name in COMPILED and find_spec("mmcv._ext") is None:
        pytest.skip(f"{name} needs mmcv's compiled operators")
    config = head_config(name)
    before = MODELS.build(config).eval()
    # Trained scores, not the tiny ones of a fresh conv_seg.
    nn.init.normal_(before.conv_seg.weight)
    after = MODELS.build(config | {"type": f"DisAlign{name}"}).eval()
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == {"calibration"}
    nn.init.normal_(after.calibration.confidence.weight)
    return before, after, features_for(config), config


def test_every_head_is_here_or_refused():
    every = {name for name in stock.__all__ if issubclass(getattr(stock, name), nn.Module)}
    assert every - set(REFUSED) - {"KernelUpdator"} == set(SOURCES)
    assert set(HEADS) == {f"DisAlign{name}" for name in SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_it_starts_at_stage_one_bit_for_bit(name):
    before, after, features, config = pair(name)
    with torch.no_grad():
        expected = scores(before, features, config)
        assert torch.equal(scores(after, features, config), expected)
        # And it is the scores that are calibrated: eq. 4 with a confidence of one.
        after.calibration.confidence.weight.zero_()
        after.calibration.confidence.bias.fill_(100)
        after.calibration.magnitude.uniform_(0.5, 2)
        after.calibration.margin.normal_()
        magnitude, margin = (getattr(after.calibration, part)[:, None, None] for part in ("magnitude", "margin"))
        torch.testing.assert_close(scores(after, features, config), magnitude * expected + margin)


def sample_of(labels):
    sample = SegDataSample()
    sample.set_data({"gt_sem_seg": PixelData(data=labels[None])})
    return sample


@pytest.mark.parametrize(
    ("name", "loss"),
    [(name, "GRWCrossEntropyLoss") for name in SOURCES]
    + [(name, "CrossEntropyLoss") for name in ("FCNHead", "DAHead")],
)
def test_only_the_calibration_learns(name, loss):
    _, _, features, config = pair(name)
    counts = dict(class_counts=list(range(1, config["num_classes"] + 1))) if loss == "GRWCrossEntropyLoss" else {}
    head = MODELS.build(config | {"type": f"DisAlign{name}", "loss_decode": dict(type=loss, **counts)})
    freeze_except(head, ["calibration", "loss_decode"])
    head.train()
    # The first step's gradient of the confidence is 0 by construction.
    nn.init.normal_(head.calibration.margin)
    labels = torch.randint(config["num_classes"], (20, 24))
    labels[:, :3] = 255
    arguments = [features]
    if name == "OCRHead":
        arguments.append(torch.randn(1, config["num_classes"], 8, 8))
    losses = head.loss(*arguments, [sample_of(labels)], {})
    sum(value for key, value in losses.items() if "loss" in key).backward()
    learning = {
        key for key, parameter in head.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert learning == {
        f"calibration.{part}" for part in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }
    assert {"confidence_mean", "magnitude_min", "margin_max"} < set(losses)


def fcn(**options):
    config = dict(type="DisAlignFCNHead", in_channels=6, channels=4, num_convs=1, num_classes=5)
    return MODELS.build(
        config | dict(loss_decode=dict(type="GRWCrossEntropyLoss", class_counts=[5, 4, 3, 2, 1])) | options
    )


def test_the_loss_is_that_of_the_upsampled_scores():
    head = fcn(align_corners=True).eval()
    nn.init.normal_(head.conv_seg.weight)
    nn.init.normal_(head.calibration.margin)
    features, labels = torch.randn(2, 6, 8, 8), torch.randint(5, (2, 30, 20))
    labels[0, :7] = 255
    losses = head.loss([features], [sample_of(one) for one in labels], {})
    upsampled = nn.functional.interpolate(head([features]), (30, 20), mode="bilinear", align_corners=True)
    rates = (1 / torch.tensor([5.0, 4, 3, 2, 1])) ** 0.2
    expected = nn.functional.cross_entropy(upsampled, labels, weight=rates, ignore_index=255)
    torch.testing.assert_close(losses["loss_grw"], expected)


def test_a_loss_that_ignores_another_label_is_refused():
    head = fcn(ignore_index=254)
    with pytest.raises(InputError, match=r"expected loss_decode\.ignore_index=254, the head's, got 255"):
        head.loss([torch.randn(1, 6, 8, 8)], [sample_of(torch.zeros(8, 8, dtype=torch.long))], {})


def test_a_list_of_one_loss_is_that_loss():
    ours = dict(type="GRWCrossEntropyLoss", class_counts=[5, 4, 3, 2, 1], sampled_pixels=7)
    assert fcn(loss_decode=[ours]).loss_decode.sampled_pixels == 7
    with pytest.raises(InputError, match="expected GRWCrossEntropyLoss alone in loss_decode, got GRWCross"):
        fcn(loss_decode=[ours, dict(type="DiceLoss")])


def test_options_of_the_calibration():
    head = fcn(calibration=dict(confidence="one", learn_margin=False))
    assert [name for name, _ in head.calibration.named_parameters()] == ["magnitude"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_heads_are_refused_with_their_reason(name):
    with pytest.raises(InputError, match="expected a head that classifies pixels, got " + name) as caught:
        MODELS.build(dict(type=f"DisAlign{name}", num_classes=5))
    assert REFUSED[name] in str(caught.value)
    with pytest.raises(InputError, match=name):
        calibrated(getattr(stock, name))


def test_a_single_sigmoid_output_is_refused():
    with pytest.raises(InputError, match="expected one output of FCNHead for each of 2 classes, got 1; a single"):
        fcn(num_classes=2, out_channels=1, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True))


@pytest.mark.skipif(find_spec("mmcv._ext") is not None, reason="mmcv has its compiled operators here")
@pytest.mark.parametrize("name", COMPILED)
def test_heads_that_need_compiled_operators_say_so(name):
    with pytest.raises(InputError, match=f"expected mmcv's compiled operators for {name}, got none; install"):
        MODELS.build(head_config(name) | {"type": f"DisAlign{name}"})


def test_a_pixel_sampler_is_refused_by_the_loss():
    head = fcn(sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=10))
    sample = sample_of(torch.randint(5, (8, 8)))
    with pytest.raises(InputError, match="expected no pixel sampler"):
        head.loss([torch.randn(1, 6, 8, 8)], [sample], {})


class MyHead(stock.FCNHead):
    """A user's own."""


class Uncalibrated(stock.FCNHead):
    """Classifies past cls_seg."""

    def forward(self, inputs):
        return self.conv_seg(self._forward_feature(inputs))


def test_a_head_of_ones_own():
    kind = calibrated(MyHead)
    assert MODELS.get("DisAlignMyHead") is kind
    assert issubclass(kind, DisAlignHead)
    assert issubclass(kind, MyHead)
    assert kind.__module__ == __name__
    with pytest.raises(InputError, match="expected a decode head of mmseg's, got Linear"):
        calibrated(nn.Linear)


def test_a_head_that_bypasses_cls_seg_is_told():
    calibrated(Uncalibrated)
    head = fcn(type="DisAlignUncalibrated")
    freeze_except(head, ["calibration"])
    with pytest.raises(InputError, match="expected DisAlignUncalibrated to classify by cls_seg"):
        head.loss([torch.randn(1, 6, 8, 8)], [sample_of(torch.randint(5, (8, 8)))], {})


def test_heads_survive_a_pickle():
    head = fcn()
    assert pickle.loads(pickle.dumps(head)).state_dict().keys() == head.state_dict().keys()
