"""The trainable parts of stage two, and how any classifier gets them."""

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .counts import ClassCounts
from .errors import InputError, some
from .freezing import freeze_except, unhold
from .functional import calibrate
from .losses import GRWCrossEntropyLoss
from .output_check import check_output

Model = TypeVar("Model", bound=nn.Module)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    # Entering torch.autocast takes as long as launching two kernels.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


class AdaptiveCalibration(nn.Module):
    """The adaptive calibration function (Sec. 3.2.1): 2K + d + 1 numbers that stage two learns.

    It starts as the exact identity (magnitude 1, margin 0). The confidence layer starts at zero, so the confidence
    starts at 1/2 for every input and no random number is drawn.

    Args:
        num_classes: K, classes to calibrate.
        feature_dim: d, length of the feature that the classifier sees.
        spatial: confidence by a 1x1 convolution on (N, d, H, W) features rather than a linear layer on (N, d).
        learn_magnitude, learn_margin: learn it, or leave it at 1, at 0 (the paper's Table 5).
        confidence: ``"learnt"``, or ``"one"`` for a fixed 1.
        passthrough: trailing score columns that are not calibrated (1 for a detector's background).

    Shapes: logits (N, K + passthrough, *), features (N, d, *); returns logits' shape.

    Raises:
        InputError: an unknown confidence, nothing to learn, or logits of another number of classes.

    Examples:
        >>> calibration = disalign.AdaptiveCalibration(num_classes=3, feature_dim=4)
        >>> logits, features = torch.randn(2, 3), torch.randn(2, 4)
        >>> torch.equal(calibration(logits, features), logits)
        True
        >>> calibration.confidence_score(features).tolist()
        [[0.5], [0.5]]
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        spatial: bool = False,
        learn_magnitude: bool = True,
        learn_margin: bool = True,
        confidence: str = "learnt",
        passthrough: int = 0,
    ) -> None:
        super().__init__()
        if confidence not in ("learnt", "one"):
            raise InputError(f"expected confidence 'learnt' or 'one', got {confidence!r}")
        if not (learn_magnitude or learn_margin):
            raise InputError("expected magnitude or margin to be learnt, got neither; switch one of them on")
        self.num_classes = num_classes
        self.passthrough = passthrough
        self.magnitude: Tensor
        self.margin: Tensor
        self._register("magnitude", torch.ones(num_classes), learn_magnitude)
        self._register("margin", torch.zeros(num_classes), learn_margin)
        self.confidence: nn.Linear | nn.Conv2d | None = None
        if confidence == "learnt":
            shape = (nn.Conv2d, feature_dim, 1, 1) if spatial else (nn.Linear, feature_dim, 1)
            self.confidence = layer = nn.utils.skip_init(*shape)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._last_confidence: Tensor | None = None

    def _register(self, name: str, start: Tensor, learnt: bool) -> None:
        if learnt:
            self.register_parameter(name, nn.Parameter(start))
        else:
            self.register_buffer(name, start, persistent=False)

    def confidence_score(self, features: Tensor) -> Tensor:
        """sigma(x) = sigmoid(v.x + b) of eq. 5; (N, d, *) -> (N, 1, *).

        In the dtype of the confidence layer's weights, under autocast too: fp32 unless the model was cast to another.
        """
        if self.confidence is None:
            return torch.ones_like(features[:, :1])
        if torch.jit.is_scripting():  # knows no autocast for a device that it learns only at run time
            return torch.sigmoid(self.confidence(features))
        with _without_autocast(features.device.type):
            return torch.sigmoid(self.confidence(features.to(self.confidence.weight.dtype)))

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        confidence = self.confidence_score(features)
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():  # an exported model has nobody to tell
            self._check_columns(logits)
            if self.training or not torch.compiler.is_compiling():  # torch.export refuses to keep anything
                self._last_confidence = confidence.detach()
        return calibrate(logits, confidence, self.magnitude, self.margin, self.passthrough)

    def _check_columns(self, logits: Tensor) -> None:
        expected = self.num_classes + self.passthrough
        if logits.shape[1] != expected:
            raise InputError(
                f"expected {expected} score columns, got {logits.shape[1]}; the calibration was built for another "
                "classifier"
            )

    def strength(self, t: float) -> "AdaptiveCalibration":
        """A copy that interpolates linearly between stage one (``t`` 0) and this calibration (1).

        The confidence is unchanged. Values outside [0, 1] extrapolate.

        Examples:
            >>> calibration = disalign.AdaptiveCalibration(num_classes=2, feature_dim=4)
            >>> calibration.magnitude.data[:] = torch.tensor([1.0, 3.0])  # as learnt
            >>> calibration.strength(0.5).magnitude.tolist()
            [1.0, 2.0]
        """
        dialled = copy.deepcopy(self)
        with torch.no_grad():
            dialled.magnitude.copy_(1 + t * (self.magnitude - 1))
            dialled.margin.copy_(t * self.margin)
        return dialled

    def statistics(self) -> dict[str, Tensor]:
        """Scalars to log: mean and standard deviation of the last batch's confidence, range of magnitude and margin."""
        report = {
            f"{name}_{bound}": getattr(getattr(self, name).detach(), bound)()
            for name in ("magnitude", "margin")
            for bound in ("min", "max")
        }
        if self._last_confidence is not None and self._last_confidence.numel():
            report["confidence_mean"] = self._last_confidence.mean()
            report["confidence_std"] = self._last_confidence.std(correction=0)
        return report

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, passthrough={self.passthrough}"


class CosineClassifier(nn.Module):
    """z_j = scale * cos(w_j, x) (eq. 3), in fp32 or better.

    Zero features and zero weights give zero scores and finite gradients.

    Args:
        feature_dim: d.
        num_classes: K.
        scale: s of eq. 3 (official: 20 at the start).
        learn_scale: learn the scale with stage one, or keep it fixed.

    Shapes: features (N, d); returns (N, K).

    Examples:
        >>> classifier = disalign.CosineClassifier(feature_dim=4, num_classes=3)
        >>> features = torch.randn(2, 4)
        >>> torch.allclose(classifier(features), classifier(10 * features), atol=1e-4)
        True
    """

    # Norms below this count as it. The gradient there is up to scale / eps, which fp16 must still hold.
    eps = 1e-3
    __constants__ = ["eps"]

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 20.0, learn_scale: bool = True) -> None:
        super().__init__()
        self.in_features = feature_dim
        self.out_features = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, feature_dim))
        # Rows of norm 1: the gradient grows with scale / norm, and a start near 0 makes the first steps diverge.
        nn.init.normal_(self.weight, std=feature_dim**-0.5)
        self.scale: Tensor
        start = torch.tensor(float(scale))
        if learn_scale:
            self.scale = nn.Parameter(start)
        else:
            self.register_buffer("scale", start)

    def forward(self, features: Tensor) -> Tensor:
        return self.cosine_scores(features)

    def cosine_scores(self, features: Tensor) -> Tensor:
        """Eq. 3; features (N, d) -> (N, K)."""
        if torch.jit.is_scripting():  # knows no autocast for a device that it learns only at run time
            return self._cosine_scores(features)
        with _without_autocast(features.device.type):
            return self._cosine_scores(features)

    def _cosine_scores(self, features: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        x = F.normalize(features.to(dtype), dim=1, eps=self.eps)
        w = F.normalize(self.weight.to(dtype), dim=1, eps=self.eps)
        return self.scale * F.linear(x, w)

    def extra_repr(self) -> str:
        return f"feature_dim={self.in_features}, num_classes={self.out_features}"


class ZeroShotClassifier(CosineClassifier):
    """A cosine classifier (eq. 3) of given directions, such as CLIP's text embeddings.

    Args:
        embeddings: (K, d), one a class, of any length.
        scale: s of eq. 3, fixed (CLIP: ``model.logit_scale.exp()``, about 100).

    Examples:
        >>> classifier = disalign.ZeroShotClassifier(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> classifier(torch.tensor([[3.0, 4.0]])).detach().round()
        tensor([[60., 80.]])
    """

    def __init__(self, embeddings: Tensor, scale: float = 100.0) -> None:
        super().__init__(embeddings.shape[1], len(embeddings), scale, learn_scale=False)
        with torch.no_grad():
            self.weight.copy_(embeddings)


class Calibrated(nn.Module):
    """Mixin for a classifier class: keeps its parameters and their names, and adds a ``calibration``.

    For a classifier of your own: ``class Mine(Calibrated, MyClassifier)`` and ``CALIBRATED[MyClassifier] = Mine``; it
    needs ``in_features``, ``out_features``, ``weight``, and a forward from features (N, d) to scores (N, K).
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of a class, and knows no modules in them
        calibration: AdaptiveCalibration

    def stage_one(self, features: Tensor) -> Tensor:
        """Stage one's scores; to be overridden without ``super()`` where TorchScript must read it."""
        return cast(Tensor, super().forward(features))

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Stage one's scores and the calibrated ones, each (N, K)."""
        logits = self.stage_one(features)
        return logits, self.calibration(logits, features)

    def forward(self, features: Tensor) -> Tensor:
        return self.scores(features)[1]


class CalibratedLinear(Calibrated, nn.Linear):
    """A linear classifier (eq. 2) with the calibration on top: DisAlign."""

    def stage_one(self, features: Tensor) -> Tensor:
        """Eq. 2; features (N, d) -> (N, K)."""
        return F.linear(features, self.weight, self.bias)


class CalibratedCosineClassifier(Calibrated, CosineClassifier):
    """A cosine classifier (eq. 3) with the calibration on top: DisAlign*."""

    def stage_one(self, features: Tensor) -> Tensor:
        """Eq. 3; features (N, d) -> (N, K)."""
        return self.cosine_scores(features)


class CalibratedConv2d(Calibrated, nn.Conv2d):
    """A 1x1 convolution on pooled features, a linear classifier (eq. 2) in another form, with the calibration."""

    def stage_one(self, features: Tensor) -> Tensor:
        """Eq. 2; features (N, d, 1, 1) -> (N, K, 1, 1)."""
        return F.conv2d(features, self.weight, self.bias)


#: Classifier -> its calibrated form; :func:`calibrate_classifier` looks here. A subclass of these (timm's Linear) needs
#: no entry.
CALIBRATED: dict[type[nn.Module], type[Calibrated]] = {
    nn.Linear: CalibratedLinear,
    nn.Conv2d: CalibratedConv2d,
    CosineClassifier: CalibratedCosineClassifier,
}


@functools.cache
def _subclass_of(kind: type[nn.Module]) -> type[Calibrated]:
    # First Calibrated, then the class itself: stage one's scores are those of its own forward.
    return type(f"Calibrated{kind.__name__}", (Calibrated, kind), {"__module__": kind.__module__})


def calibrated_form(kind: type[nn.Module]) -> type[Calibrated] | None:
    """The class of a classifier's stage two; None for what is no classifier, or calibrated already."""
    if kind in CALIBRATED:
        return CALIBRATED[kind]
    if issubclass(kind, tuple(CALIBRATED)) and not issubclass(kind, Calibrated):
        return _subclass_of(kind)  # type: ignore[arg-type]  # mypy does not know that classes are hashable
    return None


def plain_classifier(classifier: nn.Module) -> nn.Module:
    """A copy of a classifier as stage one had it, without a calibration."""
    plain = copy.deepcopy(classifier)
    unhold(plain)
    if isinstance(plain, Calibrated):
        del plain.calibration
        plain.__class__ = next(kind for kind in type(plain).__mro__ if not issubclass(kind, Calibrated))  # type: ignore
    return plain


def sizes(classifier: nn.Module) -> tuple[int, int]:
    """d, and the number of outputs."""
    if isinstance(classifier, nn.Conv2d):
        return classifier.in_channels, classifier.out_channels
    linear = cast(nn.Linear, classifier)  # or with the same attributes
    return linear.in_features, linear.out_features


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def calibrate_classifier(classifier: nn.Module, **options: Any) -> Calibrated:
    """Add a calibration to a classifier, in place; its parameters keep their identity and names.

    Args:
        classifier: an ``nn.Linear`` or a :class:`CosineClassifier`, or of a subclass.
        options: for :class:`AdaptiveCalibration`.

    Returns:
        The same object, now a :class:`CalibratedLinear`, a :class:`CalibratedCosineClassifier` or another
        :class:`Calibrated`.

    Raises:
        InputError: a classifier of another type (a calibrated one included).

    Examples:
        >>> classifier = nn.Linear(4, 3)
        >>> disalign.calibrate_classifier(classifier, confidence="one") is classifier
        True
        >>> list(classifier.state_dict())
        ['weight', 'bias', 'calibration.magnitude', 'calibration.margin']
    """
    calibrated = calibrated_form(type(classifier))
    if calibrated is None:
        raise InputError(
            f"expected a classifier of type {some(kind.__name__ for kind in CALIBRATED)}, not yet calibrated, got "
            f"{type(classifier).__name__}; for your own, see disalign.Calibrated"
        )
    if isinstance(classifier, nn.Conv2d) and not _is_pointwise(classifier):
        raise InputError(f"expected a 1x1 convolution as classifier, got {classifier}")
    width, outputs = sizes(classifier)
    options.setdefault("spatial", isinstance(classifier, nn.Conv2d))
    calibration = AdaptiveCalibration(outputs - options.get("passthrough", 0), width, **options)
    calibration.to(cast(nn.Linear, classifier).weight.device)
    classifier.__class__ = calibrated
    classifier.calibration = calibration
    return cast(Calibrated, classifier)


def with_calibration(classifier: nn.Module, calibration: AdaptiveCalibration) -> Calibrated:
    """A copy of a classifier, calibrated or not, under another calibration, on its device.

    Raises:
        InputError: a calibration of other sizes, or what :func:`calibrate_classifier` refuses.
    """
    found = calibrate_classifier(plain_classifier(classifier), passthrough=calibration.passthrough)
    if calibration.num_classes != found.calibration.num_classes:
        raise InputError(
            f"expected a calibration of {found.calibration.num_classes} classes for this classifier, got "
            f"{calibration.num_classes}"
        )
    found.calibration = copy.deepcopy(calibration).to(cast(Tensor, found.weight).device)
    return found


def find_classifier(model: nn.Module, num_classes: int) -> str:
    """Name of the model's only classifier with ``num_classes`` outputs: linear or cosine, or else a convolution.

    Raises:
        InputError: none or several fit.
    """
    fitting: list[str] = []
    for convolution in (False, True):
        fitting = fitting or [
            name
            for name, module in model.named_modules()
            if calibrated_form(type(module))
            and isinstance(module, nn.Conv2d) == convolution
            and sizes(module)[1] == num_classes
        ]
    if len(fitting) != 1:
        raise InputError(
            f"expected exactly one linear or cosine classifier with {num_classes} outputs, got "
            f"{some(fitting) or 'none'}; name it with classifier=... and check the number of classes"
        )
    return fitting[0]


def wrap_classifier(
    model: Model,
    class_counts: ClassCounts,
    rho: float = 1.2,
    classifier: str | None = None,
    reduction: str = "weighted_mean",
    check: bool = True,
    **options: Any,
) -> tuple[Model, GRWCrossEntropyLoss]:
    """Turn a trained model into its stage two, in place: calibrate its last layer and freeze the rest.

    Args:
        model: a trained module that ends in an ``nn.Linear``, a 1x1 ``nn.Conv2d`` on pooled features, or a
            :class:`CosineClassifier`.
        class_counts: training counts, anything :func:`disalign.load_class_counts` takes.
        rho: scale of eq. 11.
        classifier: name of the classifier within the model; found by its number of outputs if not given.
        reduction: of the loss.
        check: verify in the model's first forward that the classifier's scores are what the model returns; it could be
            one of two heads, or a layer with as many outputs by chance (:func:`.output_check.check_output`).
        options: ``learn_magnitude``, ``learn_margin`` and ``confidence`` of :class:`AdaptiveCalibration`.

    Returns:
        The same model, frozen except for its calibration, and the loss to train it with.

    Raises:
        InputError: the classifier is not found, has another type, or does not match the counts.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> model, loss = disalign.wrap_classifier(model, class_counts=[100, 10, 1], confidence="one")
        >>> loss(model(torch.randn(2, 8)), torch.tensor([0, 2])).backward()
        >>> [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        ['2.calibration.magnitude', '2.calibration.margin']
    """
    loss = GRWCrossEntropyLoss(class_counts, rho, reduction=reduction)
    outputs = len(loss.weight)
    name = find_classifier(model, outputs) if classifier is None else classifier
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"expected the name of a module as classifier, got {name!r}; see model.named_modules()"
        ) from None
    if calibrated_form(type(layer)) and sizes(layer)[1] != outputs:
        raise InputError(
            f"expected one count for each of the {sizes(layer)[1]} classes, got {outputs}; "
            "do the class counts belong to this model?"
        )
    if hasattr(layer, "lora_A") or name.endswith(".base_layer"):
        raise InputError(f"expected a plain classifier, got {name!r} with LoRA; call model.merge_and_unload() first")
    calibrate_classifier(layer, **options)
    freeze_except(model, [f"{name}.calibration" if name else "calibration"])
    if check:
        check_output(model, name)
    return model, loss
