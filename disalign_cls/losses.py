"""Losses of stage one other than cross-entropy; the class counts come from the training set, the rest from the config.

Any stage one takes one: ``--cfg-options model.stage_one_loss.type=BalancedSoftmaxLoss``, or in a config
``model = dict(stage_one_loss=dict(type="FocalLoss", gamma=1.0))``. Stage two starts from its checkpoint as from any.
:class:`LDAMLoss` needs a cosine classifier, officially of fixed scale 30, and its re-weighting a start epoch::

    python -m disalign_cls.train cls/cifar_lt/baseline-cosine_resnet32_1xb128-200e_cifar100-lt.py --cfg-options \\
        model.stage_one_loss.type=LDAMLoss model.stage_one_loss.defer_until=160 \\
        model.cosine.scale=30 model.cosine.learn_scale=False

In the equations z are an image's K scores, y is its label, n are the training images per class. All are means over the
images of a batch, except with LDAM's re-weighting.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from disalign import CosineClassifier, InputError
from disalign.errors import some
from disalign.functional import check_labels, grw_cross_entropy


class StageOneLoss(nn.Module):
    """Base class of these losses. For your own, define :meth:`loss` and register the class in MMEngine's MODELS.

    It has no parameters; a checkpoint stores only its :meth:`metadata`. Half-precision scores are computed in fp32.
    A class without training images gets the smallest count above 0: it is never a label.

    Args:
        options: plain values, for :meth:`metadata`.

    Shapes: scores (N, K), labels (N,) int64 in [0, K); returns a scalar.

    Raises:
        InputError: a label outside [0, K) (on the CPU, see :func:`disalign.functional.check_labels`), or a call that
            needs class counts before they are known.
    """

    #: Whether it requires a :class:`disalign.CosineClassifier`.
    cosine_only = False
    #: Epoch of the run, from 0; set by :class:`.hooks.ClassCountsHook`.
    epoch = 0

    _table: Tensor | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("_table", None, persistent=False)

    def per_class(self, counts: Tensor) -> Tensor:
        """The :attr:`table` for (K,) float64 counts > 0."""
        return counts

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        """The loss of fp32 (or better) scores of the ``classifier`` and valid labels."""
        raise NotImplementedError

    @property
    def table(self) -> Tensor:
        """:meth:`per_class` of the training set's counts, fp32 or bool."""
        if self._table is None:
            raise InputError("expected class counts before the first loss, got none; call set_class_counts(...) first")
        return self._table

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Set the training set's (K,) counts."""
        counts = class_counts.double().cpu()
        table = self.per_class(torch.where(counts > 0, counts, counts[counts > 0].min()))
        self._table = table.float() if table.is_floating_point() else table

    def metadata(self) -> dict[str, Any]:
        """Plain values stored in a checkpoint: the type and its options."""
        return {"type": type(self).__name__, **self.options}

    def forward(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        labels = check_labels(labels, scores.shape[1], ignore_index=None)
        return self.loss(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, classifier)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def build_stage_one_loss(options: dict[str, Any], classifier: nn.Module) -> StageOneLoss:
    """The loss that a config describes, for this classifier.

    Raises:
        InputError: an unknown type, one that does not fit the classifier, or bad options.
    """
    given = options.get("type")
    kind = MODELS.get(given) if isinstance(given, str) else given
    if not (isinstance(kind, type) and issubclass(kind, StageOneLoss)):
        names = sorted(one.__name__ for one in StageOneLoss.__subclasses__())
        raise InputError(f"expected model.stage_one_loss.type to be one of {some(names, len(names))}, got {given!r}")
    if kind.cosine_only and not isinstance(classifier, CosineClassifier):
        raise InputError(
            f"expected a cosine classifier for {kind.__name__}, whose margins are on cosines, got "
            f"{type(classifier).__name__}; set model.classifier='cosine'"
        )
    loss: StageOneLoss = MODELS.build(dict(options))
    return loss


@MODELS.register_module()
class FocalLoss(StageOneLoss):
    """sum_k -(1 - p_k)^gamma ln p_k, with p_k = sigmoid(z_k) for the label and sigmoid(-z_k) for any other class.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 4, without its alpha; as in Cui et al.'s code for
    images, the sum over the classes is divided by the number of images. There is no softmax in it: stage one's
    probabilities are then sigmoids. Computed in log space, so the gradient is finite for gamma < 1 too.

    Args:
        gamma: >= 0, official: 2; 0 is binary cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        _require(_in(gamma, 0, math.inf), "a finite gamma >= 0", gamma)
        super().__init__(gamma=gamma)
        self.gamma = gamma

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        signed = scores * (2 * F.one_hot(labels, scores.shape[1]) - 1)
        modulation = (self.gamma * F.logsigmoid(-signed)).exp()
        return -(modulation * F.logsigmoid(signed)).sum(1).mean()


@MODELS.register_module()
class EffectiveNumberLoss(StageOneLoss):
    """w_y * cross-entropy(z, y), with w_k = (1 - beta) / (1 - beta^n_k), scaled to sum K.

    Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, eq. 11 and its softmax form. The
    mean divides by the number of images, as their code does.

    Args:
        beta: in [0, 1), official: 0.9999 (of 0.9, 0.99, 0.999, 0.9999); 0 is cross-entropy, near 1 weights by 1 / n.
    """

    def __init__(self, beta: float = 0.9999) -> None:
        _require(_in(beta, 0, 1), "a beta in [0, 1)", beta)
        super().__init__(beta=beta)
        self.beta = beta

    def per_class(self, counts: Tensor) -> Tensor:
        return effective_number_weights(counts, self.beta)

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        return grw_cross_entropy(scores, labels, self.table, "mean")


@MODELS.register_module()
class LDAMLoss(StageOneLoss):
    """Cross-entropy of the scores less the label's margin: z_y - s * Delta_y, with Delta_k = C / n_k^(1/4).

    z = s * cos, so margins are on cosines. s is the classifier's own ``scale`` (official: fixed at 30). Cao et al.,
    Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019, eq. 13 and Algorithm 1, with
    their code's weighted mean: sum(w * ce) / sum(w) over the images of a process.

    Args:
        max_margin: >= 0, the largest Delta, which gives C (official: 0.5); 0 is cross-entropy.
        defer_until: epoch, from 0, at which :class:`EffectiveNumberLoss`'s weights start (official: 160 of 200);
            ``None``: never. A run counted in iterations stays in epoch 0.
        beta: of these weights, official: 0.9999.
    """

    cosine_only = True

    def __init__(self, max_margin: float = 0.5, defer_until: int | None = None, beta: float = 0.9999) -> None:
        _require(_in(max_margin, 0, math.inf), "a finite max_margin >= 0", max_margin)
        whole = type(defer_until) is int and defer_until >= 0
        _require(defer_until is None or whole, "defer_until to be an epoch >= 0 or None", defer_until)
        _require(_in(beta, 0, 1), "a beta in [0, 1)", beta)
        super().__init__(max_margin=max_margin, defer_until=defer_until, beta=beta)
        self.max_margin, self.defer_until, self.beta = max_margin, defer_until, beta

    def per_class(self, counts: Tensor) -> Tensor:
        margins = self.max_margin * (counts.min() / counts) ** 0.25
        return torch.stack([margins, effective_number_weights(counts, self.beta)])

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        margins, weights = self.table
        if self.defer_until is None or self.epoch < self.defer_until:
            weights = torch.ones_like(weights)
        scores = scores - F.one_hot(labels, scores.shape[1]) * (classifier.scale * margins)
        return grw_cross_entropy(scores, labels, weights, "weighted_mean")


@MODELS.register_module()
class EqualizationLoss(StageOneLoss):
    """-ln(exp(z_y) / sum_k w_k exp(z_k)), with w_k = 1 - b * [f_k < tail_share] for k other than y, and w_y = 1.

    f = n / sum(n); b is 1 with probability gamma, else 0, drawn anew for each image and class: images of other classes
    mostly leave a rare class alone. Tan et al., Equalization Loss for Long-Tailed Object Recognition, CVPR 2020, the
    softmax form for classification.

    Args:
        gamma: in [0, 1]; 0 is cross-entropy.
        tail_share: lambda, > 0; the more classes, the smaller it has to be. Both defaults are those of the code of
            Zhang et al., Bag of Tricks for Long-Tailed Visual Recognition, AAAI 2021, for CIFAR-100-LT.

    Raises:
        InputError: no class is rarer than ``tail_share``.
    """

    def __init__(self, gamma: float = 0.9, tail_share: float = 5e-3) -> None:
        _require(_in(gamma, 0, 1) or gamma == 1, "a gamma in [0, 1]", gamma)
        _require(_in(tail_share, 0, math.inf) and tail_share > 0, "a finite tail_share > 0", tail_share)
        super().__init__(gamma=gamma, tail_share=tail_share)
        self.gamma, self.tail_share = gamma, tail_share

    def per_class(self, counts: Tensor) -> Tensor:
        share = counts / counts.sum()
        if not (share < self.tail_share).any():
            raise InputError(
                f"expected classes with a smaller share of the training images than {self.tail_share:g}, got "
                f"{share.min():.2g} and more; raise model.stage_one_loss.tail_share"
            )
        return share < self.tail_share

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        others = F.one_hot(labels, scores.shape[1]) == 0
        dropped = others & self.table & (torch.rand_like(scores) < self.gamma)
        return F.cross_entropy(scores.masked_fill(dropped, -math.inf), labels)


@MODELS.register_module()
class BalancedSoftmaxLoss(StageOneLoss):
    """Cross-entropy of z + ln n: the scores are then those of a class-balanced set.

    Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020, eq. 3-4.
    """

    def per_class(self, counts: Tensor) -> Tensor:
        return counts.log()

    def loss(self, scores: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
        return F.cross_entropy(scores + self.table, labels)


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """w_k = (1 - beta) / (1 - beta^n_k), scaled to sum K; (K,) float64 counts > 0 -> (K,) float64."""
    # expm1, since 1 - beta^n loses precision for beta near 1.
    weights = -1 / torch.expm1(counts * counts.new_tensor(beta).log())
    return weights * (len(weights) / weights.sum())


def _in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value < high


def _require(fits: bool, expected: str, value: Any) -> None:
    if not fits:
        raise InputError(f"expected {expected}, got {value!r}")
