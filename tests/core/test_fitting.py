"""Fitting a calibration to features, against references of other libraries and of arithmetic in numpy."""

import math
import re
import subprocess
import sys
import textwrap
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import nn

import disalign
from disalign import CosineClassifier, Features, InputError, ZeroShotClassifier, fitting, probes, solver
from disalign.modules import plain_classifier

COUNTS = [60, 30, 12, 5, 2]
WIDTH = 7


def draw(counts=COUNTS, seed=0, spread=1.5, dtype=torch.float32, **options):
    """Gaussian classes around centres that depend on nothing but the class."""
    centres = torch.randn(len(counts), WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = centres[y] + spread * torch.randn(len(y), WIDTH, generator=generator)
    return Features.from_arrays(x.to(dtype), y, **options)


def linear(classes=5, seed=3, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, classes, dtype=dtype)


def weights_of(counts, rho):
    """Eq. 11, averaging 1, in fp32 as the loss has them."""
    powers = np.asarray(counts, float) ** -rho
    return (powers / powers.mean()).astype(np.float32).astype(float)


def objective(theta, classifier, features, rho, penalty, anchor, confidence):
    """The objective in numpy, from eq. 4-5 and 8-11."""
    x, y = features.x.double().numpy(), features.y.numpy()
    k = len(features.class_counts)
    z = x @ classifier.weight.detach().double().numpy().T + classifier.bias.detach().double().numpy()
    magnitude, margin, v, b = theta[:k], theta[k : 2 * k], theta[2 * k : -1], theta[-1]
    sigma = np.ones((len(x), 1)) if confidence == "one" else scipy.special.expit(x @ v + b)[:, None]
    scores = sigma * (magnitude * z + margin) + (1 - sigma) * z
    losses = scipy.special.logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    w = weights_of(features.class_counts, rho)[y] * features.weights.numpy()
    pull = ((magnitude - 1) ** 2).sum() + ((margin - anchor) ** 2).sum() + (v**2).sum()
    return (w * losses).sum() / w.sum() + penalty / 2 * pull


def parameters(calibrated):
    calibration = calibrated.calibration
    parts = [calibration.magnitude, calibration.margin]
    if calibration.confidence is not None:
        parts += [calibration.confidence.weight[0], calibration.confidence.bias]
    else:
        parts += [torch.zeros(WIDTH), torch.zeros(1)]
    return torch.cat(parts).detach().double().numpy()


def identity():
    return np.concatenate([np.ones(5), np.zeros(5 + WIDTH + 1)])


@pytest.mark.parametrize("confidence", ["one", "learnt"])
@pytest.mark.parametrize("rho", [0.0, 1.2])
def test_it_starts_at_the_identity_and_ends_at_its_own_objective(rho, confidence):
    features = draw(weights=np.linspace(0.5, 2, sum(COUNTS)))
    classifier = linear()
    found = disalign.fit(features, classifier, rho, confidence=confidence, penalty=0.02)
    solution = found.fit_report.solution
    reference = [
        objective(theta, classifier, features, rho, 0.02, 0.0, confidence) for theta in (identity(), parameters(found))
    ]
    assert [solution.start, solution.end] == pytest.approx(reference, rel=1e-6)
    assert solution.end < solution.start
    assert solution.converged


@pytest.mark.parametrize("anchor", ["zero", "logit_adjust"])
def test_the_optimum_is_that_of_another_solver(anchor):
    features, classifier = draw(dtype=torch.float64), linear(dtype=torch.float64)
    found = disalign.fit(features, classifier, 1.2, confidence="one", anchor=anchor, penalty=0.02)
    target = np.log(weights_of(COUNTS, 1.2)) if anchor == "logit_adjust" else np.zeros(len(COUNTS))
    reference = scipy.optimize.minimize(
        lambda theta: objective(
            np.concatenate([theta, np.zeros(WIDTH + 1)]), classifier, features, 1.2, 0.02, target, "one"
        ),
        identity()[: 2 * len(COUNTS)],
        method="BFGS",
        options={"gtol": 1e-8},
    )
    assert parameters(found)[: 2 * len(COUNTS)] == pytest.approx(reference.x, abs=1e-5)
    assert found.fit_report.solution.end == pytest.approx(reference.fun, rel=1e-9)


@pytest.mark.parametrize("confidence", ["one", "learnt"])
def test_the_gradient_is_that_of_the_objective(confidence):
    features, classifier = draw(dtype=torch.float64), linear(dtype=torch.float64)
    calibrated = disalign.calibrate_classifier(plain_classifier(classifier), confidence=confidence).double()
    calibration = calibrated.calibration
    random = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in calibration.parameters():
            parameter += 0.3 * torch.from_numpy(random.normal(size=parameter.shape))
    seen = {}

    def evaluated(names, evaluate, distance, *_):
        values = [parameter.detach().clone().requires_grad_() for parameter in names]
        value, gradients = evaluate()
        pull = torch.autograd.grad(distance(values), values, allow_unused=True, materialize_grads=True)
        seen["value"] = float(value + distance(values))
        gradient = torch.cat([(g + p).flatten() for g, p in zip(gradients, pull, strict=True)])
        seen["gradient"] = gradient.detach().numpy()  # in torch 2.6 the materialised zeros require gradients

    weight = torch.from_numpy(weights_of(COUNTS, 0.7))
    theta = parameters(calibrated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "minimise", evaluated)
        fitting._lbfgs(calibration, [solver.Part(classifier, features)], weight, torch.zeros(()), 0.05, [])
    arguments = (classifier, features, 0.7, 0.05, 0.0, confidence)
    assert seen["value"] == pytest.approx(objective(theta, *arguments), rel=1e-12)
    reference = scipy.optimize.approx_fprime(theta, objective, 1e-7, *arguments)[: len(seen["gradient"])]
    assert seen["gradient"] == pytest.approx(reference, abs=1e-6)


def test_rho_zero_is_plain_cross_entropy():
    features, classifier = draw(), linear()
    found = disalign.fit(features, classifier, 0.0)
    plain = nn.functional.cross_entropy(classifier(features.x), features.y)
    assert found.fit_report.solution.start == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("confidence", ["one", "learnt"])
def test_another_order_of_the_classes_gives_the_same_in_that_order(confidence):
    features, classifier = draw(), linear()
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = plain_classifier(classifier)
    with torch.no_grad():
        permuted.weight.copy_(classifier.weight[order])
        permuted.bias.copy_(classifier.bias[order])
    labels = order.argsort()[features.y]
    options = {"confidence": confidence, "anchor": "logit_adjust" if confidence == "one" else "zero"}
    one = disalign.fit(features, classifier, **options).calibration
    other = disalign.fit(Features.from_arrays(features.x, labels), permuted, **options).calibration
    torch.testing.assert_close(other.magnitude, one.magnitude[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.margin, one.margin[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_same_call_gives_the_same_bits(kind):
    found = [disalign.fit(draw(), kind, C=1.0).state_dict() for _ in range(2)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_chunks_only_limit_the_memory(monkeypatch):
    features, classifier = draw(), linear()
    one = parameters(disalign.fit(features, classifier))
    monkeypatch.setitem(solver.CHUNK, "cpu", 50)  # 7 rows
    assert parameters(disalign.fit(features, classifier)) == pytest.approx(one, abs=1e-5)


def fitted_by_ranks():
    background = draw([60, 30, 12, 40], class_counts=[60, 30, 12], background=True)
    one_row = Features.from_arrays(torch.ones(1, WIDTH), [0], class_counts=COUNTS)
    anchored = {"confidence": "one", "anchor": "logit_adjust"}
    return [
        disalign.fit(draw(), linear()),
        disalign.fit(draw(), linear(), confidence="one"),
        disalign.fit(draw(), linear(), **anchored),
        disalign.fit(background, linear(4), 0.8),
        disalign.fit(one_row, linear()),  # the second rank has no row
    ]


def rank_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    crossed = disalign.fit(draw(), "linear", C=1.0, confidence="one")
    found = [one.state_dict() for one in fitted_by_ranks()]
    torch.save((found, crossed.fit_report.out_of_fold_accuracy, crossed.weight.detach()), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    ranks, accuracies, probed = zip(*ranks, strict=True)
    for first, second, one in zip(*ranks, fitted_by_ranks(), strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-5)
    alone = disalign.fit(draw(), "linear", C=1.0, confidence="one")
    unseen = alone.fit_report.out_of_fold_accuracy
    assert accuracies == (pytest.approx(unseen), pytest.approx(unseen))
    for weight in probed:
        torch.testing.assert_close(weight, alone.weight, rtol=0, atol=0.01)


def test_a_strong_penalty_holds_the_start_and_the_anchor():
    features, classifier = draw(), linear()
    held = disalign.fit(features, classifier, 1.0, confidence="one", anchor="logit_adjust", penalty=1e4).calibration
    logs = -np.log(np.asarray(COUNTS) / sum(COUNTS))
    margin = held.margin.detach().numpy()
    assert margin - margin[0] == pytest.approx(logs - logs[0], abs=1e-3)
    assert held.magnitude.detach().numpy() == pytest.approx(np.ones(5), abs=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
def test_the_anchor_follows_rho(rho):
    weight = torch.from_numpy(weights_of(COUNTS, rho))
    expected = -rho * np.log(COUNTS)
    found = fitting.log_weights(weight).numpy()
    assert found - found[0] == pytest.approx(expected - expected[0], abs=1e-6)
    behind = fitting.log_weights(torch.cat([weight, torch.tensor([0.25])]), background=True).numpy()
    assert behind == pytest.approx(found - math.log(0.25), abs=1e-9)


def test_several_rho_share_stage_one():
    found = disalign.fit(draw(), "linear", [0.5, 1.5], C=1.0)
    assert list(found) == [0.5, 1.5]
    assert torch.equal(found[0.5].weight, found[1.5].weight)
    alone = disalign.fit(draw(), "linear", 1.5, C=1.0)
    assert all(torch.equal(tensor, found[1.5].state_dict()[name]) for name, tensor in alone.state_dict().items())
    assert [one.fit_report.rho for one in found.values()] == [0.5, 1.5]


def test_the_given_classifier_stays_as_it_is():
    classifier = linear()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    found = disalign.fit(draw(), classifier)
    assert type(classifier) is nn.Linear
    assert classifier.state_dict().keys() == before.keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in before.items())
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {
        f"calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }


def test_a_calibrated_classifier_is_calibrated_anew():
    first = disalign.fit(draw(), linear(), 2.0)
    again = disalign.fit(draw(), first, 1.0).state_dict()
    assert all(
        torch.equal(again[name], tensor) for name, tensor in disalign.fit(draw(), linear(), 1.0).state_dict().items()
    )


@pytest.mark.parametrize(("magnitude", "margin"), [(True, False), (False, True)])
def test_what_is_not_learnt_stays(magnitude, margin):
    found = disalign.fit(draw(), linear(), learn_magnitude=magnitude, learn_margin=margin).calibration
    assert torch.equal(found.magnitude, torch.ones(5)) != magnitude
    assert torch.equal(found.margin, torch.zeros(5)) != margin


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_with_confidence_one_it_folds_into_a_stock_classifier(kind):
    features = draw()
    found = disalign.fit(features, kind, 1.0, confidence="one", anchor="logit_adjust", C=1.0).eval()
    folded = disalign.fold_classifier(found)
    torch.testing.assert_close(folded(features.x), found(features.x), rtol=1e-4, atol=1e-4)


def test_a_cosine_fold_starts_from_its_own_rows():
    features = draw()
    rows = torch.arange(0, len(features), 2)
    found = probes.new_classifier("cosine", features, rows)
    assert torch.equal(found.weight, probes.new_classifier("cosine", features.part(rows)).weight)


def test_a_background_is_not_calibrated_and_weighs_as_said():
    counts = [50, 20, 5, 40]
    features = draw(counts, class_counts=[50, 20, 5], background=True)
    classifier = linear(4)
    found = disalign.fit(features, classifier, 1.0, confidence="one", background_weight=0.5)
    assert found.calibration.magnitude.shape == (3,)
    assert torch.equal(found(features.x)[:, 3], classifier(features.x)[:, 3])
    losses = nn.functional.cross_entropy(classifier(features.x), features.y, reduction="none")
    w = torch.from_numpy(np.append(weights_of(counts[:3], 1.0), 0.5))[features.y]
    assert found.fit_report.solution.start == pytest.approx(float((w * losses).sum() / w.sum()), rel=1e-6)


def test_a_balanced_background_is_the_losss():
    counts = [50, 20, 5, 40]
    features = draw(counts, class_counts=[50, 20, 5], background=True)
    classifier = linear(4)
    balanced = disalign.GRWCrossEntropyLoss([50, 20, 5], 0.8, background_weight="balanced").weight[-1]
    found = disalign.fit(features, classifier, 0.8, background_weight="balanced")
    same = disalign.fit(features, classifier, 0.8, background_weight=float(balanced))
    assert parameters(found).tolist() == parameters(same).tolist()


def test_accuracy_is_of_the_foregrounds_classes():
    features = draw([50, 20, 5, 400], class_counts=[50, 20, 5], background=True)
    classifier = linear(4)
    expected = recall_score(features.y, classifier(features.x).argmax(1), labels=[0, 1, 2], average="macro")
    assert probes.accuracy([solver.Part(classifier, features)]) == pytest.approx(100 * expected)


def pixels(rows=60, cells=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cells, WIDTH, generator=generator)
    bilinear = torch.rand(rows, cells, generator=generator)
    bilinear /= bilinear.sum(1, keepdim=True)
    y = torch.randint(0, 5, (rows,), generator=generator)
    return Features.from_arrays(x, y, bilinear=bilinear, class_counts=COUNTS)


def test_a_pixel_has_the_interpolated_calibrated_scores_of_its_cells():
    features, classifier = pixels(), linear()
    found = disalign.fit(features, classifier, 0.5, penalty=0.1)

    def objective(calibrated):
        scores = torch.stack([calibrated(features.x[:, cell]) for cell in range(4)], 1).double()
        mixed = torch.einsum("ngk,ng->nk", scores, features.bilinear.double())
        w = torch.from_numpy(weights_of(COUNTS, 0.5))[features.y]
        losses = nn.functional.cross_entropy(mixed, features.y, reduction="none")
        theta = parameters(calibrated) - identity()
        return float((w * losses).sum() / w.sum()) + 0.05 * float((theta[:-1] ** 2).sum())

    start = disalign.calibrate_classifier(plain_classifier(classifier))
    solution = found.fit_report.solution
    assert [solution.start, solution.end] == pytest.approx([objective(start), objective(found)], rel=1e-6)
    assert solution.end < solution.start


def test_pixels_on_one_cell_are_ordinary_rows():
    features, classifier = draw(), linear()
    x = torch.stack([features.x, 99 + torch.randn_like(features.x)], 1)
    on_one = Features.from_arrays(x, features.y, bilinear=torch.tensor([[1.0, 0.0]]).expand(len(x), 2))
    found, expected = disalign.fit(on_one, classifier), disalign.fit(features, classifier)
    assert parameters(found) == pytest.approx(parameters(expected), abs=1e-6)


def test_chunks_of_pixels_are_no_larger_than_others(monkeypatch):
    monkeypatch.setitem(solver.CHUNK, "cpu", 8 * 4 * WIDTH)
    part = solver.Part(linear(), pixels())
    assert [len(chunk.x) for chunk in part.chunks()] == [8] * 7 + [4]
    assert torch.equal(torch.cat([chunk.bilinear for chunk in part.chunks()]), pixels().bilinear)


def test_folds_of_classes_of_one_example_are_refused():
    features = Features.from_arrays(torch.randn(5, 3), range(5))
    with pytest.raises(InputError, match="expected a class with two examples to hold one out, got none"):
        disalign.fit(features, "linear", C=1.0, confidence="one")


def test_minibatches_without_weight_change_nothing():
    torch.manual_seed(0)
    x, y, weights = torch.randn(8, WIDTH), [0, 1] * 4, [1.0, 1.0] + [0.0] * 6
    steps = {"solver": "sgd", "batch_size": 2, "epochs": 3, "weight_decay": 0.0, "momentum": 0.0}
    found = disalign.fit(Features.from_arrays(x, y, weights), linear(2), **steps)
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())
    assert (found.calibration.magnitude != 1).all()


@pytest.mark.parametrize("options", [{"classifier": "linear"}, {"cross_fit": 2}, {"solver": "sgd"}])
def test_pixels_are_not_trained_on_anew(options):
    given = {"classifier": linear(), **options}
    with pytest.raises(InputError, match="for features of pixels"):
        disalign.fit(pixels(), given.pop("classifier"), **given)


def test_pixels_known_by_heart_are_not_told_to_be_folded():
    x = torch.eye(5).repeat(3, 1)[:, None].expand(15, 4, 5)
    known = Features.from_arrays(x, torch.arange(15) % 5, bilinear=torch.full((15, 4), 0.25))
    classifier = nn.Linear(5, 5)
    with torch.no_grad():
        classifier.weight.copy_(9 * torch.eye(5))
        classifier.bias.zero_()
    with pytest.warns(UserWarning, match="memorised examples") as told:
        disalign.fit(known, classifier)
    assert "calibration_features" in str(told[0].message)
    assert "cross_fit" not in str(told[0].message)


def test_nothing_to_learn_is_refused_before_a_pass():
    with pytest.raises(InputError, match="expected magnitude or margin to be learnt, got neither"):
        fitting.require_options(learn_magnitude=False, learn_margin=False)


def test_totals_of_the_whole_set_divide_a_samples_loss():
    features, classifier = draw(), linear()
    sample = Features.from_arrays(
        features.x[::2], features.y[::2], weights=torch.full((55,), 2.5), class_counts=COUNTS, totals=[60, 30, 12, 5, 2]
    )
    found = disalign.fit(sample, classifier, 1.0, confidence="one")
    losses = nn.functional.cross_entropy(classifier(sample.x), sample.y, reduction="none").double()
    w = weights_of(COUNTS, 1.0)
    expected = (torch.from_numpy(w)[sample.y] * losses * 2.5).sum() / (w * np.array(COUNTS)).sum()
    assert found.fit_report.solution.start == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
def test_as_many_classes_as_inaturalist_has():
    counts = disalign.load_class_counts("inaturalist2018")
    classes = len(counts)
    torch.manual_seed(0)
    centres, y = torch.randn(classes, 16), torch.arange(classes)
    features = Features.from_arrays(centres + torch.randn(classes, 16), y, class_counts=counts)
    classifier = nn.Linear(16, classes)
    with torch.no_grad():
        classifier.weight.copy_(centres)
        classifier.bias.copy_(counts.log() - centres.square().sum(1) / 2)
    # A strong penalty, for few evaluations.
    found = disalign.fit(features, classifier, 1.0, confidence="one", anchor="logit_adjust", penalty=1.0)
    losses = nn.functional.cross_entropy(classifier(features.x), y, reduction="none").double()
    w = torch.from_numpy(weights_of(counts, 1.0))
    anchored = 0.5 * float(w.log().square().sum())  # the penalty of a margin of 0
    start = float((w * losses).sum() / w.sum()) + anchored
    assert found.fit_report.solution.start == pytest.approx(start, rel=1e-6)
    right = [(model(features.x).argmax(1) == y).double().mean() for model in (classifier, found)]
    assert right[1] > right[0]


@pytest.mark.slow
@pytest.mark.minutes
def test_a_hundred_thousand_classes_in_a_gibibyte(tmp_path):
    benchmark = Path(__file__).parents[2] / "benchmarks" / "fit.py"
    command = [sys.executable, str(benchmark), "classes", "--rows", "500", "--out", str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(re.search(r"memory above the mapped features: (\d+) MiB", said)[1]) < 1024, said

    features, kept = Features.open(tmp_path / "features"), torch.load(tmp_path / "fit.pth")
    weight, bias, magnitude, margin = (tensor.double() for tensor in kept["state"].values())
    classes = len(features.class_counts)
    seen = torch.bincount(features.y, minlength=classes) > 0
    w = torch.from_numpy(weights_of(features.class_counts, 1.0))
    anchor = w.log()
    assert (len(features), classes) == (500, 100_000)
    assert kept["report"]["left_out"] == tuple((~seen).nonzero()[:, 0].tolist())
    assert (magnitude[~seen] == 1).all()
    torch.testing.assert_close(margin[~seen], anchor[~seen], rtol=1e-6, atol=1e-6)

    def objective_and_gradients(magnitude, margin):
        far = torch.stack([magnitude - 1, margin - anchor])
        value, gradients = 0.05 * far.square().sum(), 0.1 * far
        for x, y in zip(features.x.double().split(50), features.y.split(50), strict=True):
            z = x @ weight.T + bias
            scores = magnitude * z + margin
            total, share = scores.logsumexp(1), (w[y] / w[features.y].sum())[:, None]
            value += (share[:, 0] * (total - scores.gather(1, y[:, None])[:, 0])).sum()
            pull = share * (scores - total[:, None]).exp_().scatter_add_(1, y[:, None], -torch.ones(len(y), 1).double())
            gradients += torch.stack([(pull * z).sum(0), pull.sum(0)])
        return float(value), float(gradients[:, seen].abs().max())

    start, steep = objective_and_gradients(torch.ones(classes).double(), torch.where(seen, 0, anchor))
    end, flat = objective_and_gradients(magnitude, margin)
    solution = kept["report"]["solution"]
    assert (solution["start"], solution["end"]) == (pytest.approx(start, rel=1e-6), pytest.approx(end, rel=1e-6))
    assert flat < 1e-5 * steep


def test_half_precision_features_and_importance_weights():
    full = draw()
    features = Features.from_arrays(full.x.half(), full.y)
    expected = parameters(disalign.fit(full, linear(), confidence="one"))
    assert parameters(disalign.fit(features, linear(), confidence="one")) == pytest.approx(expected, abs=0.02)
    twice = Features.from_arrays(
        torch.cat([full.x, full.x[:3]]), torch.cat([full.y, full.y[:3]]), class_counts=full.class_counts
    )
    weighted = Features.from_arrays(full.x, full.y, [2.0] * 3 + [1.0] * (len(full) - 3))
    assert parameters(disalign.fit(weighted, linear())) == pytest.approx(
        parameters(disalign.fit(twice, linear())), abs=2e-3
    )


def test_a_held_out_split_teaches_with_the_counts_of_the_training_set():
    features, apart = draw(), draw([20] * 5, seed=1)
    found = disalign.fit(features, linear(), 1.0, calibration_features=apart)
    w = torch.from_numpy(weights_of(COUNTS, 1.0))[apart.y]
    losses = nn.functional.cross_entropy(linear()(apart.x), apart.y, reduction="none")
    assert found.fit_report.solution.start == pytest.approx(float((w * losses).sum() / w.sum()), rel=1e-6)


# Probes and folds


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_a_linear_probe_is_scikit_learns(C):
    features = draw(dtype=torch.float64)
    found = probes.new_classifier("linear", features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "TOLERANCE", 1e-9)
        probes.train_classifier(found, features, C)
    reference = LogisticRegression(C=C, tol=1e-9, max_iter=10_000).fit(features.x.numpy(), features.y.numpy())
    assert found.weight.detach().numpy() == pytest.approx(reference.coef_, abs=1e-4)
    bias = found.bias.detach().numpy()
    assert bias - bias.mean() == pytest.approx(reference.intercept_ - reference.intercept_.mean(), abs=1e-4)


def test_a_cosine_probe_learns():
    features = draw([40] * 5)
    found = probes.new_classifier("cosine", features)
    solution = probes.train_classifier(found, features, 1.0)
    assert solution.end < solution.start
    assert isinstance(found, CosineClassifier)
    assert probes.accuracy([solver.Part(found, features)]) > 60


def test_folds_are_stratified_and_even():
    features = draw([33, 9, 4, 1])
    fold = probes.stratified_folds(features, 4, seed=5)
    sizes = torch.bincount(fold, minlength=4)
    assert sizes.max() - sizes.min() <= 1
    for label in range(4):
        of_class = torch.bincount(fold[features.y == label], minlength=4)
        assert of_class.max() - of_class.min() <= 1
    assert not torch.equal(fold, probes.stratified_folds(features, 4, seed=6))


def by_heart(rows=240, width=400, seed=0):
    """Labels that have nothing to do with the features, of which there are enough to learn each row by heart."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, width)).astype(np.float32), np.arange(rows) % 3


def test_no_fold_scores_a_row_that_it_has_seen():
    features = Features.from_arrays(*by_heart())
    report = disalign.fit(features, "linear", C=100.0, confidence="one").fit_report
    assert report.train_accuracy == 100
    assert 20 < report.out_of_fold_accuracy < 47  # chance: a third


def test_groups_are_not_split_over_folds():
    x, y = by_heart()
    x, y, groups = np.concatenate([x, x]), np.concatenate([y, y]), np.tile(np.arange(240), 2)
    apart = disalign.fit(Features.from_arrays(x, y, groups=groups), "linear", C=100.0, confidence="one").fit_report
    assert 20 < apart.out_of_fold_accuracy < 47
    split = disalign.fit(Features.from_arrays(x, y), "linear", C=100.0, confidence="one").fit_report
    assert split.out_of_fold_accuracy > 75


def test_features_that_know_their_labels_are_said():
    features = Features.from_arrays(np.eye(3, dtype=np.float32)[np.arange(60) % 3], np.arange(60) % 3)
    with pytest.warns(UserWarning, match="get 100.0 % right of examples that they have not seen"):
        disalign.fit(features, "linear", C=10.0)


@pytest.mark.parametrize("anchor", ["zero", "logit_adjust"])
def test_a_class_of_one_example_is_left_out(anchor, caplog):
    features = draw([40, 20, 10, 1])
    found = disalign.fit(features, "linear", 1.0, confidence="one", anchor=anchor, C=1.0)
    assert found.fit_report.left_out == (3,)
    assert found.calibration.magnitude[3] == 1
    anchored = math.log(weights_of([40, 20, 10, 1], 1.0)[3]) if anchor == "logit_adjust" else 0
    assert float(found.calibration.margin[3].detach()) == pytest.approx(anchored, rel=1e-6)
    assert (found.calibration.magnitude[:3] != 1).all()
    assert "too few examples to learn from in class 3; magnitude stays 1 there" in caplog.text


def test_the_folds_choose_the_penalty():
    features = Features.from_arrays(*by_heart())
    assert min(probes.GRID) == disalign.fit(features, "linear").fit_report.C  # there is nothing to learn
    assert disalign.fit(draw([40] * 3, spread=0.5), "linear", confidence="one").fit_report.C >= 1


def test_with_folds_a_given_classifier_is_trained_anew_and_this_is_said(caplog):
    classifier = linear()
    found = disalign.fit(draw(), classifier, cross_fit=5, C=1.0)
    assert "the given classifier is trained anew" in caplog.text
    assert not torch.equal(found.weight, classifier.weight)
    assert torch.equal(found.weight, disalign.fit(draw(), "linear", C=1.0).weight)


def test_a_training_set_known_by_heart_is_said():
    features = Features.from_arrays(*by_heart())
    with pytest.warns(UserWarning, match=r"stage one gets 100.0 % of its training set right"):
        disalign.fit(features, "linear", cross_fit=0, C=100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the warning advises
        disalign.fit(features, "linear", cross_fit=0, C=100.0, confidence="one", anchor="logit_adjust")


def test_a_frequent_class_alone_is_not_the_training_set_known_by_heart():
    """99 of 100 rows are right, but none of the rare class."""
    features = Features.from_arrays(torch.ones(100, 1), [0] * 99 + [1])
    classifier = nn.Linear(1, 2)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0], [0.0]]))
        classifier.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert disalign.fit(features, classifier).fit_report.train_accuracy == 50


def test_cross_fitting_sees_the_bias_that_a_memorised_training_set_hides():
    counts = [120, 60, 30, 15, 8]
    features, test = draw(counts, spread=1.0), draw([200] * 5, seed=1, spread=1.0)

    features, test = Features.from_arrays(*widened(features)), Features.from_arrays(*widened(test, seed=9))
    options = {"C": 1e4, "confidence": "one"}
    crossed = disalign.fit(features, "linear", 1.0, **options)
    with pytest.warns(UserWarning, match="memorised examples"):
        plain = disalign.fit(features, "linear", 1.0, cross_fit=0, **options)
    one, own, unseen = (
        probes.accuracy([solver.Part(classifier, test)]) for classifier in (plain_classifier(plain), plain, crossed)
    )
    assert unseen > own + 2
    assert own > one


def widened(features, seed=8):
    """With noise enough to learn each row by heart."""
    noise = torch.randn(len(features), 300, generator=torch.Generator().manual_seed(seed))
    return torch.cat([features.x, 0.3 * noise], 1), features.y


class Normalised(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x))


def broken():
    classifier = linear()
    with torch.no_grad():
        classifier.weight[0, 0] = math.nan
    return classifier


REFUSED = {
    "cross_fit 1": ({"cross_fit": 1}, "expected cross_fit 0, or 2 or more folds, got 1"),
    "a zero-shot classifier": (
        {"classifier": ZeroShotClassifier(torch.eye(5, WIDTH)), "cross_fit": 5},
        "expected cross_fit=0 for a zero-shot classifier",
    ),
    "an anchor with a confidence": ({"anchor": "logit_adjust"}, "expected anchor 'zero', or 'logit_adjust' with conf"),
    "an unknown anchor": ({"anchor": "one"}, "got 'one' with 'learnt'"),
    "a negative penalty": ({"penalty": -1.0}, "expected a finite penalty >= 0, got -1.0"),
    "another solver": ({"solver": "adam"}, "expected solver 'lbfgs' or 'sgd', got 'adam'"),
    "a recipe for L-BFGS": ({"lr": 0.1}, "or with solver='sgd' epochs, batch_size, lr,"),
    "folds under SGD": (
        {"solver": "sgd", "cross_fit": 5},
        "expected solver='sgd' without cross_fit",
    ),
    "folds beside a split": ({"calibration_features": draw(), "cross_fit": 5}, "either cross_fit or calibration_feat"),
    "a penalty under SGD": ({"solver": "sgd", "penalty": 1.0}, "expected solver='sgd' without cross_fit"),
    "SGD of no epochs": ({"solver": "sgd", "epochs": 0}, "expected 1 epoch and batch_size 1 or more, got 0"),
    "SGD at a rate of nan": ({"solver": "sgd", "lr": math.nan}, "expected a finite number as the optimizer's lr"),
    "SGD at a negative rate": ({"solver": "sgd", "lr": -1.0}, "expected options of SGD, but: Invalid learning rate"),
    "C of 0": ({"classifier": "linear", "C": 0.0}, "expected a finite C > 0, got 0.0"),
    "C of a word": ({"classifier": "linear", "C": "a"}, "expected a finite C > 0, got 'a'"),
    "C for a given classifier": ({"C": 1.0}, "expected no C for a classifier that is not trained here"),
    "folds of a half": ({"cross_fit": 2.5}, "expected cross_fit 0, or 2 or more folds, got 2.5"),
    "more folds than rows": ({"cross_fit": 1000}, "expected 1000 rows or groups for cross_fit=1000, got 109"),
    "a weightless background": ({"background_weight": 0.0}, "expected a background_weight > 0"),
    "an anchor of a margin that stays": (
        {"anchor": "logit_adjust", "confidence": "one", "learn_margin": False},
        "a margin that is learnt, got 'logit_adjust' with 'one' and learn_margin=False",
    ),
    "a convolution": (
        {"classifier": nn.Conv2d(WIDTH, 5, 1)},
        "of features (N, d), got Conv2",
    ),
    "a sequence": ({"classifier": nn.Sequential(nn.Linear(WIDTH, 5))}, "of features (N, d), got Sequential"),
    "a classifier of NaN": ({"classifier": broken()}, "expected a finite calibration at rho 1.0, got NaN"),
    "a forward of its own in folds": (
        {"classifier": Normalised(WIDTH, 5), "cross_fit": 5},
        "expected a plain linear or cosine classifier to train anew, got Normalised",
    ),
    "fewer classes": ({"classifier": nn.Linear(WIDTH, 4)}, "expected a classifier of 7 features and 5 outputs"),
    "another width": ({"classifier": nn.Linear(8, 5)}, "got 8 and 5"),
    "an unknown probe": ({"classifier": "quadratic"}, "expected a classifier 'linear' or 'cosine'"),
    "a negative rho": ({"rho": -1.0}, "expected a finite rho >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        disalign.fit(draw(), **({"classifier": linear(), "rho": 1.0} | options))


def test_a_forward_of_its_own_is_calibrated_on_its_own_scores():
    features, classifier = draw(), Normalised(WIDTH, 5)
    found = disalign.fit(features, classifier, 0.0)
    plain = nn.functional.cross_entropy(classifier(features.x), features.y)
    assert found.fit_report.solution.start == pytest.approx(float(plain.detach()), rel=1e-6)


def test_a_class_in_one_group_is_left_out_and_one_in_two_is_not():
    features = draw([40, 20, 10, 6])
    groups = torch.arange(len(features))
    groups[features.y == 3] = 1000  # all in one film
    groups[(features.y == 2).nonzero()[:5]] = 1001  # in two films, one of them
    groups[(features.y == 2).nonzero()[5:]] = 1000  # with the rarest class
    grouped = Features.from_arrays(features.x, features.y, groups=groups)
    report = disalign.fit(grouped, "linear", 1.0, confidence="one", C=1.0).fit_report
    assert report.left_out == (3,)


def test_a_class_without_rows_to_learn_from_keeps_the_anchor():
    features, apart = draw([40, 20, 10, 5]), draw([20, 20, 20], class_counts=[20, 20, 20, 0])
    options = {"calibration_features": apart, "confidence": "one", "anchor": "logit_adjust"}
    found = disalign.fit(features, linear(4), 1.0, **options)
    assert found.fit_report.left_out == (3,)
    assert found.calibration.magnitude[3] == 1
    assert float(found.calibration.margin[3].detach()) == pytest.approx(math.log(weights_of([40, 20, 10, 5], 1.0)[3]))


def test_the_report_is_of_the_stage_one_that_comes_back():
    features = Features.from_arrays(*by_heart())
    given = nn.Linear(400, 3)
    report = disalign.fit(features, given, cross_fit=5, C=100.0, confidence="one").fit_report
    assert report.train_accuracy == 100
    assert disalign.fit(features, given).fit_report.C is None


def test_sgd_weighs_its_rows():
    features = draw()
    weighted = Features.from_arrays(features.x, features.y, np.where(np.arange(len(features)) % 2, 1.0, 0.0))
    found = disalign.fit(weighted, linear(), solver="sgd", batch_size=len(features))
    half = Features.from_arrays(features.x[1::2], features.y[1::2], class_counts=features.class_counts)
    expected = disalign.fit(half, linear(), solver="sgd", batch_size=len(features))
    assert parameters(found) == pytest.approx(parameters(expected), abs=1e-5)


def held_out_scores(features, **options):
    """(N, K) of the linear classifiers that have not seen the rows."""
    parts, _ = probes.held_out("linear", features, 5, 1.0, **options)
    scores = torch.empty(len(features), len(features.class_counts))
    for part in parts:
        scores[part.rows] = part.classifier(features.x[part.rows]).detach()
    return scores


@pytest.mark.parametrize("seed", [0, 3])
def test_held_out_scores_teach_but_not_those_of_a_class_that_is_left_out(seed):
    counts = [40, 20, 10, 1]
    features = draw(counts)
    found = disalign.fit(features, "linear", 1.0, confidence="one", C=1.0, seed=seed)
    losses = nn.functional.cross_entropy(held_out_scores(features, seed=seed), features.y, reduction="none").numpy()
    w = np.append(weights_of(counts, 1.0)[:3], 0)[features.y]
    assert found.fit_report.solution.start == pytest.approx((w * losses).sum() / w.sum(), rel=1e-5)


def test_a_background_of_one_example_is_left_out():
    features = draw([40, 20, 10, 1], class_counts=[40, 20, 10], background=True)
    found = disalign.fit(features, "linear", 1.0, confidence="one", C=1.0)
    assert found.fit_report.left_out == (3,)
    assert (found.calibration.magnitude != 1).all()


def test_the_anchor_is_less_the_backgrounds_weight():
    features = draw([50, 20, 5, 40], class_counts=[50, 20, 5], background=True)
    options = {"confidence": "one", "anchor": "logit_adjust", "penalty": 1e4, "background_weight": 0.5}
    margin = disalign.fit(features, linear(4), 1.0, **options).calibration.margin.detach().numpy()
    assert margin == pytest.approx(np.log(weights_of([50, 20, 5], 1.0)) - math.log(0.5), abs=1e-3)


def test_a_class_that_the_training_set_lacks():
    features = draw([40, 20, 10], class_counts=[40, 20, 10, 0])
    with pytest.raises(InputError, match="expected at least one training example per class, got none for class 3"):
        disalign.fit(features, linear(4))
    found = disalign.fit(features, linear(4), 1.0, zero_count="exclude")
    assert found.fit_report.left_out == (3,)
    losses = nn.functional.cross_entropy(linear(4)(features.x), features.y, reduction="none").detach().numpy()
    w = weights_of([40, 20, 10], 1.0)[features.y]
    assert found.fit_report.solution.start == pytest.approx((w * losses).sum() / w.sum(), rel=1e-5)


def test_folds_are_five_where_stage_one_is_trained_here_on_these_rows_alone():
    given = [{"classifier": linear()}, {"calibration_features": draw(seed=1)}, {"solver": "sgd", "epochs": 1}]
    found = [disalign.fit(draw(), **{"classifier": "linear", "C": None} | options) for options in given]
    assert [one.fit_report.cross_fit for one in found] == [0, 0, 0]
    assert disalign.fit(draw(), C=1.0).fit_report.cross_fit == 5


def test_without_folds_the_inverse_penalty_is_one():
    found, expected = (disalign.fit(draw(), "linear", cross_fit=0, C=C) for C in (None, 1.0))
    assert found.fit_report.C == 1
    assert torch.equal(found.weight, expected.weight)


def test_a_solver_that_stops_early_is_said(monkeypatch, caplog):
    monkeypatch.setattr(fitting, "minimise", lambda *given: solver.minimise(*given, most=3))
    assert not disalign.fit(draw(), linear()).fit_report.solution.converged
    assert "the solver stopped after 3 evaluations, before it had converged" in caplog.text


def test_scores_of_rows_that_taught_no_one_are_no_cause_for_a_warning(recwarn):
    features, apart = Features.from_arrays(*by_heart()), Features.from_arrays(*by_heart(seed=1))
    report = disalign.fit(features, "linear", C=100.0, calibration_features=apart).fit_report
    assert (report.train_accuracy, report.cross_fit) == (100, 0)
    corners = torch.eye(3)
    disalign.fit(Features.from_arrays(corners, range(3)), ZeroShotClassifier(corners, 10.0))
    assert not recwarn


def test_a_given_classifier_that_knows_less_than_the_folds_is_said():
    features, given = draw(), linear()
    own = 100 * balanced_accuracy_score(features.y, given(features.x).argmax(1))
    with pytest.warns(UserWarning, match=f"and stage one {own:.1f} % of its training set"):
        disalign.fit(features, given, cross_fit=5, C=1.0)


SGD = {"epochs": 3, "batch_size": 32, "lr": 0.2, "momentum": 0.5, "weight_decay": 0.1, "max_norm": 0.05, "seed": 4}


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"schedule": 5}])
def test_sgd_step_by_step(options):
    features, classifier = draw(weights=np.linspace(0.5, 2, sum(COUNTS)), dtype=torch.float64), linear()
    found = disalign.fit(features, classifier.double(), 1.2, confidence="one", solver="sgd", **SGD, **options)
    z, w = classifier(features.x).detach(), torch.from_numpy(weights_of(COUNTS, 1.2))[features.y] * features.weights
    theta, velocity = torch.cat([torch.ones(5), torch.zeros(5)]).double().requires_grad_(), 0
    decay, epochs, summed = 0.1 * (torch.arange(10) >= 5), options.get("schedule", 3), [0.0, 0.0, 0.0]
    for epoch in range(3):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(4 + epoch))
        for rows in order.split(32):
            scores = theta[:5] * z[rows] + theta[5:]
            losses = scores.logsumexp(1) - scores[torch.arange(len(rows)), features.y[rows]]
            loss = (w[rows] * losses).sum() / w[rows].sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            gradient = gradient * min(1, 0.05 / float(gradient.norm())) + decay * theta.detach()
            velocity = 0.5 * velocity + gradient
            step = gradient + 0.5 * velocity if "nesterov" in options else velocity
            theta = (theta - 0.1 * (1 + math.cos(math.pi * epoch / epochs)) * step).detach().requires_grad_()
            summed[epoch] += float(loss.detach()) * len(rows) / len(features)
    assert parameters(found)[:10] == pytest.approx(theta.detach().numpy(), abs=1e-5)
    solution = found.fit_report.solution
    assert [solution.start, solution.end] == pytest.approx([summed[0], summed[2]], rel=1e-5)
    assert solution.evaluations == 3 * 4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_probe_ends_at_its_own_objective(kind):
    features = draw(weights=np.linspace(0.5, 2, sum(COUNTS)), dtype=torch.float64)
    found = probes.new_classifier(kind, features)
    end = probes.train_classifier(found, features, 0.3).end
    x, weight, total = features.x, found.weight.detach(), float(features.weights.sum())
    if kind == "linear":
        scores, squares = x @ weight.T + found.bias.detach(), weight.square().sum()
    else:
        scale = float(found.scale.detach())
        cosines = (x / x.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
        scores, squares = scale * cosines, 5 * scale**2
    losses = scores.logsumexp(1) - scores[torch.arange(len(x)), features.y]
    expected = (features.weights * losses).sum() / total + squares / (2 * 0.3 * total)
    assert end == pytest.approx(float(expected), rel=1e-9)


def test_a_cosine_probe_starts_at_mean_directions():
    features = draw(dtype=torch.float64)
    directions = features.x.numpy() / np.linalg.norm(features.x.numpy(), axis=1, keepdims=True)
    sums = np.stack([directions[features.y.numpy() == label].sum(0) for label in range(5)])
    found = probes.new_classifier("cosine", features).weight.detach().numpy()
    assert found == pytest.approx(sums / np.linalg.norm(sums, axis=1, keepdims=True), abs=1e-6)


def test_a_probe_like_another_is_of_its_kind():
    features = draw(dtype=torch.float16)
    plain = probes.new_classifier(nn.Linear(1, 1, bias=False), features)
    assert plain.bias is None
    assert plain.weight.dtype == torch.float32
    fixed = probes.new_classifier(CosineClassifier(1, 1, scale=7.0, learn_scale=False), features)
    probes.train_classifier(fixed, features, 1.0)
    assert float(fixed.scale) == 7
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]
    assert isinstance(probes.new_classifier(CosineClassifier(1, 1), features).scale, nn.Parameter)


def test_the_folds_choice_is_the_best_of_the_grid_and_comes_back():
    features = draw(weights=np.linspace(0.5, 2, sum(COUNTS)))
    parts, chosen = probes.held_out("linear", features, 5, None, 0)
    tried = {C: probes.held_out("linear", features, 5, C, 0)[0] for C in probes.GRID}

    def lost(parts):
        losses = [
            nn.functional.cross_entropy(part.classifier(features.x[part.rows]), features.y[part.rows], reduction="none")
            for part in parts
        ]
        return float((torch.cat(losses) * features.weights[torch.cat([part.rows for part in parts])]).sum())

    assert chosen == min(tried, key=lambda C: lost(tried[C]))
    assert lost(parts) == pytest.approx(lost(tried[chosen]), rel=1e-3)


def test_accuracy_counts_rows_by_their_weights():
    x, y = torch.eye(3), torch.tensor([0, 1, 0])  # the last one is taken for class 2, of which there are no rows
    classifier = nn.Linear(3, 3)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(3))
        classifier.bias.zero_()
    features = Features.from_arrays(x, y, [1.0, 2.0, 3.0], class_counts=[2, 1, 5])
    assert probes.accuracy([solver.Part(classifier, features)]) == pytest.approx((25 + 100) / 2)


def test_films_with_a_rare_class_are_dealt_out_evenly():
    films = torch.arange(20).repeat_interleave(4)
    y = torch.zeros(80, dtype=torch.int64)
    y[:20:4] = 1  # a row of each of the first five films
    fold = probes.stratified_folds(Features.from_arrays(torch.zeros(80, 1), y, groups=films), 5)
    assert fold[y == 1].sort().values.tolist() == [0, 1, 2, 3, 4]


def test_a_copy_of_stage_one_follows_train():
    plain = plain_classifier(disalign.fit(draw(), linear()))
    assert plain.train().training


def test_a_zero_shot_classifier_is_calibrated_on_its_own_scores():
    embeddings = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7))
    found = disalign.fit(draw(), ZeroShotClassifier(embeddings, 10.0), 1.0, confidence="one")
    assert torch.equal(found.weight, embeddings)
    assert found.fit_report.solution.end < found.fit_report.solution.start


ON_A_GPU = """
import torch, disalign
from test_fitting import draw, linear, parameters
for options in ({}, {"confidence": "one", "anchor": "logit_adjust"}):
    alone = parameters(disalign.fit(draw(), linear(), **options))
    found = [disalign.fit(draw(), linear().cuda(), **options).cpu() for _ in range(2)]
    assert abs(parameters(found[0]) - alone).max() < 5e-3, abs(parameters(found[0]) - alone).max()
    assert (parameters(found[0]) == parameters(found[1])).all()
crossed = disalign.fit(draw(), linear().cuda(), cross_fit=5, C=1.0, confidence="one")
assert crossed.weight.device.type == "cuda"
"""


@pytest.mark.gpu
def test_on_a_gpu(gpu_environment):
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n{textwrap.dedent(ON_A_GPU)}"
    done = subprocess.run([sys.executable, "-c", program], env=gpu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
