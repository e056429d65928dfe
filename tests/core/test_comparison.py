"""The comparison of methods: its figures by other routes, what is compared where; the test split decides nothing."""

import copy
import inspect
import json
import math
import re
import statistics
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score, log_loss
from torch import nn

import disalign
from disalign import CosineClassifier, Features, InputError, comparison
from disalign.comparison import DEFAULT, METHODS, Problem, Tally, candidates, chosen_methods, merged, table

COUNTS = [150, 40, 12, 4]
WIDTH = 5
GROUPS = {
    "many": torch.tensor([True, True, False, False]),
    "few": torch.tensor([False, False, True, True]),
}


def draw(counts=COUNTS, seed=0, **options):
    y = np.repeat(range(4), counts)
    x = 0.8 * np.random.default_rng(9).normal(size=(4, WIDTH))[y]
    x += np.random.default_rng(seed).normal(size=x.shape)
    return Features.from_arrays(x.astype(np.float32), y, **options)


TEST = draw([30] * 4, 1)


@pytest.fixture(scope="module")
def compared():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return disalign.compare(
            draw(),
            TEST,
            classifier(),
            ["disalign", "tau_normalize", "ncm"],
            rho=1.0,
            sweep=(0.0, 1.0, 2.0),
            balanced=draw([60] * 4, 2),
            others={"another": nn.Linear(WIDTH, 4)},
            classes=list("abcd"),
            dataset="gaussians",
            stage_one="one.pth",
        )


def classifier():
    found = disalign.fit(draw(), "linear", cross_fit=0, C=1.0)
    return disalign.modules.plain_classifier(found)


# ------------------------------------------------------------------------------------------------------- figures


def tallied(scores, labels, groups=GROUPS, batch=7, **options):
    told = Tally(4, groups, **options)
    for some_scores, some_labels in zip(scores.split(batch), labels.split(batch), strict=True):
        told.add(some_scores, some_labels)
    return told


@pytest.fixture(scope="module")
def scored():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    scores = torch.randn(200, 4, generator=generator) + 1.5 * nn.functional.one_hot(labels, 4)
    return scores, labels


def test_figures_are_scikit_learns(scored):
    scores, labels = scored
    found, best, truth = tallied(scores, labels).figures(), scores.argmax(1).numpy(), labels.numpy()
    assert found["average"] == pytest.approx(100 * accuracy_score(truth, best))
    assert found["balanced"] == pytest.approx(100 * balanced_accuracy_score(truth, best))
    assert found["nll"] == pytest.approx(log_loss(truth, scores.double().softmax(1).numpy()), rel=1e-5)
    iou = jaccard_score(truth, best, average=None)
    assert found["mIoU"] == pytest.approx(100 * iou.mean())
    assert found["mIoU.few"] == pytest.approx(100 * iou[2:].mean())
    accuracy = [100 * (best[truth == label] == label).mean() for label in range(4)]
    assert found["many"] == pytest.approx(np.mean(accuracy[:2]))
    assert found["few"] == pytest.approx(np.mean(accuracy[2:]))


def test_the_calibration_error_is_that_of_fifteen_bins(scored):
    scores, labels = scored
    probabilities = scores.softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for low in range(15):
        chosen = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if chosen.any():
            expected += chosen.mean() * abs(confidence[chosen].mean() - right[chosen].mean())
    told = tallied(scores, labels)
    assert told.figures()["ece"] == pytest.approx(100 * expected, abs=1e-4)
    reliability = told.details()["reliability"]
    assert sum(reliability["count"]) == 200
    chosen = (confidence > 8 / 15) & (confidence <= 9 / 15)
    assert reliability["accuracy"][8] == pytest.approx(100 * right[chosen].mean())
    assert reliability["confidence"][8] == pytest.approx(100 * confidence[chosen].mean(), abs=1e-4)


def test_too_sure_and_not_sure_enough_do_not_cancel_out():
    told = tallied(torch.tensor([[math.log(9), 0, -99, -99], [math.log(1.5), 0, -99, -99]]), torch.tensor([1, 0]))
    assert told.figures()["ece"] == pytest.approx((90 + 40) / 2)


def test_a_certain_score_falls_into_the_last_bin():
    told = tallied(torch.tensor([[1000.0, 0, 0, 0]]), torch.tensor([0]))
    assert told.details()["reliability"]["count"] == [0.0] * 14 + [1.0]
    assert told.figures()["ece"] == 0.0


def test_the_confusion_of_groups_is_a_share_of_each(scored):
    scores, labels = scored
    best = scores.argmax(1)
    head_of_tail = ((labels >= 2) & (best < 2)).sum() / (labels >= 2).sum()
    confusion = tallied(scores, labels).details()["confusion"]
    assert confusion[1][0] == pytest.approx(100 * float(head_of_tail))
    assert [sum(row) for row in confusion] == pytest.approx([100, 100])


def test_batches_do_not_matter(scored):
    whole, parts = tallied(*scored, batch=200), tallied(*scored, batch=3)
    assert parts.figures() == pytest.approx(whole.figures())


def test_a_weighted_example_counts_as_often(scored):
    scores, labels = scored
    weights = torch.arange(200) % 3
    weighted = Tally(4, GROUPS)
    weighted.add(scores, labels, weights)
    repeated = tallied(scores.repeat_interleave(weights, 0), labels.repeat_interleave(weights))
    assert weighted.figures() == pytest.approx(repeated.figures())
    assert weighted.details()["confusion"] == pytest.approx(np.array(repeated.details()["confusion"]))
    assert weighted.details()["reliability"]["count"] == repeated.details()["reliability"]["count"]


def test_a_class_of_no_group_is_in_no_row_of_the_confusion():
    groups = GROUPS | {"many": torch.tensor([True, False, False, False])}
    told = tallied(torch.eye(4)[[0, 2, 0, 1]], torch.tensor([0, 2, 1, 3]), groups)
    assert told.details()["confusion"] == [[100.0, 0.0], [0.0, 100.0]]


def test_half_precision_scores_lose_nothing_more():
    scores = torch.tensor([[9.0, 0, 0, 0], [8.0, 0, 0, 0]])
    labels = torch.tensor([0, 0])
    assert tallied(scores.half(), labels).figures() == tallied(scores, labels).figures()


WRONG = {
    "NaN": (torch.full((1, 4), math.nan), GROUPS, "expected finite scores to evaluate"),
    "infinity": (torch.tensor([[math.inf, 0, 0, 0]]), GROUPS, "expected finite scores to evaluate"),
    "classes": (torch.zeros(1, 3), GROUPS, "expected scores of 4 classes, got 3"),
    "groups": (torch.zeros(1, 4), {"all": torch.tensor([True])}, "expected 4 classes in group 'all', got 1"),
    "a group's name": (torch.zeros(1, 4), GROUPS | {"nll": GROUPS["few"]}, "other names than the figures, got nll"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scores_that_cannot_be_evaluated_are_refused(name):
    scores, groups, sentence = WRONG[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        tallied(scores, torch.tensor([0]), groups)


def test_no_group_may_have_a_figures_name():
    for name in Tally(4, {}).figures():
        with pytest.raises(InputError, match=f"expected groups of other names than the figures, got {name}; rename"):
            Tally(4, {name: GROUPS["few"]})


def test_what_is_not_there_has_no_figure():
    told = tallied(torch.eye(4)[:2], torch.tensor([0, 0]), probabilities=False)
    assert told.figures()["few"] is None
    assert told.figures()["ece"] is None
    assert math.isnan(told.per_class()["accuracy"][3])
    assert told.figures()["balanced"] == told.figures()["mIoU"] == 50
    assert "reliability" not in told.details()


# ------------------------------------------------------------------------------------------- what is compared where


def test_the_controls_are_always_there():
    assert chosen_methods(["disalign"], "classification", False) == ["stage_one", "logit_adjust", "rho_0", "disalign"]


def test_by_default_what_makes_sense():
    assert chosen_methods(None, "classification", False) == [name for name in METHODS if name in DEFAULT]
    assert set(DEFAULT) - set(chosen_methods(None, "classification", True)) == {"tau_normalize"}
    assert set(DEFAULT) - set(chosen_methods(None, "detection", False)) == {"crt", "ncm"}


def test_all_is_all_that_makes_sense():
    found = {task: set(chosen_methods(["all"], task, False)) for task in ("classification", "detection")}
    assert set(METHODS) - found["classification"] == {"norcal", "bound"}
    assert "norcal" in found["detection"]
    assert not found["detection"] & {"crt", "ncm", "ncm_l2", "rebalance", "disalign_cross_fit", "bound"}


#: Method -> the same by a call of its own: rho 0.7, seed 3, and for the closed forms a setting that is no default.
BY_HAND = {
    "stage_one": lambda train, one: one,
    "logit_adjust": lambda train, one: disalign.methods.logit_adjust(one, COUNTS, 0.7),
    "tau_normalize": lambda train, one: disalign.methods.tau_normalize(one, 0.7),
    "vs": lambda train, one: disalign.methods.vs(one, COUNTS, tau=1.0, gamma=0.7),
    "rebalance": lambda train, one: disalign.methods.rebalance(one, train.x, train.weights),
    "lws": lambda train, one: disalign.fit(train, one, 0.7, confidence="one", learn_margin=False),
    "marc": lambda train, one: disalign.fit(
        train, one, 0.7, confidence="one", margin_scale=one.weight.detach().square().sum(1).sqrt()
    ),
    "crt": lambda train, one: disalign.methods.crt(train, one, 0.7, C=1.0),
    "ncm": lambda train, one: disalign.methods.nearest_mean(train, "cosine"),
    "ncm_l2": lambda train, one: disalign.methods.nearest_mean(train, "l2"),
    "vector_scaling": lambda train, one: disalign.fit(train, one, 0.0, confidence="one"),
    "rho_0": lambda train, one: disalign.fit(train, one, 0.0),
    "disalign_magnitude": lambda train, one: disalign.fit(train, one, 0.7, learn_margin=False),
    "disalign_margin": lambda train, one: disalign.fit(train, one, 0.7, learn_magnitude=False),
    "disalign_one": lambda train, one: disalign.fit(train, one, 0.7, confidence="one"),
    "disalign": lambda train, one: disalign.fit(train, one, 0.7),
    "disalign_anchor": lambda train, one: disalign.fit(train, one, 0.7, confidence="one", anchor="logit_adjust"),
    "disalign_shrunk": lambda train, one: disalign.methods.shrink(
        disalign.fit(train, one, 0.7, confidence="one", anchor="logit_adjust", penalty=0.01).calibration, COUNTS, 0.7
    ),
    "disalign_cross_fit": lambda train, one: disalign.fit(
        train, one, 0.7, confidence="one", anchor="logit_adjust", cross_fit=5, seed=3
    ),
    "bound": lambda train, one: disalign.methods.crt(train, one, 0.0, C=1.0),
}


@pytest.fixture(scope="module")
def fitted_once():
    return classifier()


@pytest.mark.parametrize("name", BY_HAND)
def test_a_name_stands_for_its_method(name, fitted_once):
    train, one = draw(weights=1 + np.arange(sum(COUNTS)) % 2), fitted_once
    problem = Problem(train, one, rho=0.7, seed=3)
    expected = BY_HAND[name](train, one)
    if isinstance(expected, disalign.AdaptiveCalibration):
        expected = disalign.modules.with_calibration(one, expected)
    found = comparison.learnt(name, problem, 0.7 if METHODS[name].setting != "rho" else problem.rho).classifier
    torch.testing.assert_close(found(TEST.x), expected(TEST.x), rtol=1e-5, atol=1e-5)
    assert METHODS[name].probabilities == (name not in ("ncm", "ncm_l2"))


def test_every_method_is_checked_by_hand():
    assert METHODS.keys() - BY_HAND.keys() == {"norcal"}  # below, beside a background


def test_the_settings_of_a_method_are_its_functions_own(fitted_once):
    problem = Problem(draw(), fitted_once, rho=0.7)
    for name, method in METHODS.items():
        default = comparison.setting_of(name, problem)
        if method.setting in ("tau", "gamma", "strength"):
            assert default == inspect.signature(getattr(disalign.methods, name)).parameters[method.setting].default
            assert not method.grid or default in method.grid
        else:
            assert default == (0.7 if method.setting == "rho" else 0.0)


@pytest.mark.parametrize("name", ["disalign", "lws", "marc", "vector_scaling"])
def test_options_of_the_fit_are_passed_on(name):
    """A background's weight, and classes without examples."""
    counts = [100, 30, 10, 0]
    y = np.repeat(range(5), [*counts, 50])
    x = np.random.default_rng(0).normal(size=(len(y), WIDTH)).astype(np.float32)
    rows = Features.from_arrays(x, y, class_counts=counts, background=True)
    torch.manual_seed(0)
    one, rho = nn.Linear(WIDTH, 5), METHODS[name].value if METHODS[name].setting == "" else 0.7
    options = {} if name == "disalign" else {"confidence": "one"}
    options |= {"learn_margin": False} if name == "lws" else {}
    options |= {"margin_scale": one.weight.detach().norm(dim=1)[:4]} if name == "marc" else {}
    given = {"background_weight": 0.3, "zero_count": "exclude"}
    expected = disalign.fit(rows, one, rho, **options, **given)
    found = comparison.learnt(name, Problem(rows, one, 0.7, **given), rho).classifier
    torch.testing.assert_close(found(rows.x), expected(rows.x), rtol=1e-5, atol=1e-5)


#: None has training examples of class 1, and all of none but class 3 images.
SOME = {"examples": torch.tensor([3, 0, 2, 1]), "images": torch.tensor([2, 2, 2, 0])}


def test_all_leaves_out_what_needs_an_example_of_each_class(caplog):
    found = chosen_methods(["all"], "detection", False, SOME)
    left_out = set(chosen_methods(["all"], "detection", False)) - set(found)
    assert left_out == {"norcal", "vs", "disalign_shrunk"}
    assert [one.getMessage() for one in caplog.records] == [
        "norcal is left out: it needs training images of each class, and there are none for class 3",
        "vs is left out: it needs training examples of each class, and there are none for class 1",
        "disalign_shrunk is left out: it needs training examples of each class, and there are none for class 1",
    ]
    assert "norcal" not in chosen_methods(["all"], "detection", False, {"images": None})
    enough = {name: counts + 1 for name, counts in SOME.items()}
    caplog.clear()
    assert set(chosen_methods(["all"], "detection", False, enough)) - set(found) == left_out
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "sentence"), [("vs", "examples of each class, and there are none for class 1"), ("norcal", "for class 3")]
)
def test_a_named_method_that_needs_an_example_of_each_class_is_refused(name, sentence):
    with pytest.raises(InputError, match=f"got '{name}': it needs training .*{sentence}"):
        chosen_methods(["stage_one", name], "detection", False, SOME)


def test_the_methods_that_need_an_example_of_each_class_are_those_that_refuse(fitted_once):
    """With classes left out all others learn."""
    counts = [150, 40, 12, 0]
    problem = Problem(
        draw(counts, class_counts=counts), fitted_once, zero_count="exclude", image_counts=torch.tensor(counts)
    )
    for name, method in METHODS.items():
        if name == "norcal":
            with pytest.raises(InputError, match="expected at least one training example per class"):
                disalign.methods.norcal(fitted_once, counts)
        elif method.needs:
            with pytest.raises(InputError, match="expected at least one training example per class"):
                comparison.learnt(name, problem, comparison.setting_of(name, problem))
        else:
            comparison.learnt(name, problem, comparison.setting_of(name, problem))


REFUSED = {
    "unknown": (["disalgn"], "classification", False, "expected methods among stage_one, logit_adjust, tau_normalize"),
    "norms of cosines": (["tau_normalize"], "classification", True, "the norms of a cosine classifier's weights"),
    "norcal of images": (["norcal"], "classification", False, "'norcal': it spares a background"),
    "cRT of a detector": (["crt"], "detection", False, "make sense for detection, got 'crt': its background is"),
    "MARC of cosines": (["marc"], "classification", True, "the norms of a cosine classifier's weights"),
    "means of pixels": (["ncm"], "segmentation", False, "a row is a pixel interpolated from four cells"),
    "the bound by name": (["bound"], "classification", False, "compare(..., balanced=FEATURES)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    *options, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        chosen_methods(*options)


def test_features_of_another_trunk_are_refused():
    other = Features.from_arrays(torch.randn(8, WIDTH + 1), np.arange(8) % 4)
    with pytest.raises(InputError, match=r"expected test features like Features\(206 x 5 float32, 4 classes\)"):
        disalign.compare(draw(), other, classifier())


def test_what_compare_has_no_use_for_is_refused(fitted_once):
    rows = Features.from_arrays(torch.randn(8, WIDTH), np.arange(8) % 5, class_counts=[1] * 4, background=True)
    with pytest.raises(InputError, match="expected features without a background"):
        disalign.compare(draw(), rows, fitted_once)
    with pytest.raises(InputError, match="expected titles of others that name no method, got lws"):
        disalign.compare(draw(), TEST, fitted_once, others={"lws": fitted_once})
    with pytest.raises(InputError, match=r"linear or cosine classifier of features \(N, d\), got Sequential"):
        disalign.compare(draw(), TEST, nn.Sequential(fitted_once))
    with pytest.raises(InputError, match=r"linear or cosine classifier of features \(N, d\), got Sequential"):
        disalign.compare(draw(), TEST, fitted_once, others={"mine": nn.Sequential(fitted_once)})
    with pytest.raises(InputError, match=r"expected a classifier of 5 features and 4 outputs .*, got 6 and 4"):
        disalign.compare(draw(), TEST, nn.Linear(WIDTH + 1, 4))


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, WIDTH, generator=generator)
    weights = torch.rand(60, generator=generator) + 0.5
    return Features.from_arrays(
        x, np.arange(60) % 4, weights, bilinear=torch.rand(60, 4, generator=generator).softmax(1)
    )


def test_pixels_need_a_given_classifier(pixels):
    with pytest.raises(InputError, match="a row an example to learn a classifier from, got rows interpolated from"):
        disalign.compare(pixels, pixels, "linear")


def test_the_confidence_of_a_pixel_is_interpolated_from_its_cells(pixels, fitted_once):
    found = methods_of(disalign.compare(pixels, pixels, fitted_once, ["disalign"], rho=0.7, dial=()))
    score = disalign.fit(pixels, fitted_once, 0.7).calibration.confidence_score
    cells = torch.stack([score(pixels.x[:, cell])[:, 0] for cell in range(4)], 1).detach()
    confidence = (cells * pixels.bilinear).sum(1)
    count = np.histogram(confidence, 15, (0, 1), weights=pixels.weights)[0]
    assert found["disalign"]["confidence"]["count"] == pytest.approx(count.tolist())
    assert found["disalign"]["confidence"]["mean"] == pytest.approx(np.average(confidence, weights=pixels.weights))


def test_a_rank_is_not_compared_on_its_share_of_the_rows(fitted_once, monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(InputError, match="expected one process for a comparison, got 2 of"):
        disalign.compare(draw(), TEST, fitted_once)


def test_groups_are_refused_before_anything_is_learnt(fitted_once, monkeypatch):
    monkeypatch.setattr(comparison, "candidates", lambda *_: pytest.fail("it has learnt"))
    with pytest.raises(InputError, match="other names than the figures, got average, ece"):
        disalign.compare(draw(), TEST, fitted_once, groups={"ece": GROUPS["few"], "average": GROUPS["many"]})


@pytest.mark.parametrize(("rows", "own"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_classifier_of_another_dtype_than_the_features(rows, own, fitted_once):
    """As with devices, what is learnt from features need not lie where stage one does."""
    train, test = (Features.from_arrays(some.x.to(rows), some.y) for some in (draw(), TEST))
    expected = methods_of(disalign.compare(draw(), TEST, fitted_once, dial=()))
    found = methods_of(disalign.compare(train, test, copy.deepcopy(fitted_once).to(own), dial=()))
    assert {name: one["figures"]["average"] for name, one in found.items()} == pytest.approx(
        {name: one["figures"]["average"] for name, one in expected.items()}, abs=1.0
    )


def test_a_class_without_training_examples_can_be_left_out(fitted_once):
    train = draw([150, 40, 12, 0], class_counts=[150, 40, 12, 0])
    with pytest.raises(InputError, match="zero_count='exclude'"):
        disalign.compare(train, TEST, fitted_once, ["disalign"])
    with pytest.raises(InputError, match=r"got 'vs': it needs training examples of each class, .* for class 3"):
        disalign.compare(train, TEST, fitted_once, ["vs"], zero_count="exclude")
    found = methods_of(disalign.compare(train, TEST, fitted_once, ["all"], zero_count="exclude", dial=()))
    assert set(chosen_methods(["all"], "classification", False)) - found.keys() == {"vs", "disalign_shrunk"}
    margin = -np.log([150, 40, 12])
    adjusted = np.array(found["logit_adjust"]["margin"])
    assert np.diff(adjusted[:3]) == pytest.approx(np.diff(margin), abs=1e-5)
    assert adjusted[3] == 0
    assert found["disalign"]["magnitude"][3] == 1


def test_seed_weights_and_groups_are_passed_on(fitted_once):
    test = Features.from_arrays(TEST.x, TEST.y, weights=1 + np.arange(120) % 2)
    methods = ["disalign", "disalign_cross_fit"]
    content = disalign.compare(draw(), test, fitted_once, methods, rho=0.7, seed=3, dial=())
    found = methods_of(content)
    expected = disalign.fit(
        draw(), fitted_once, 0.7, confidence="one", anchor="logit_adjust", cross_fit=5, seed=3
    ).calibration.margin
    assert found["disalign_cross_fit"]["margin"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert content["runs"][0]["seed"] == 3
    right = fitted_once(TEST.x).argmax(1) == TEST.y
    average = 100 * np.average(right.numpy(), weights=test.weights)
    assert found["stage_one"]["figures"]["average"] == pytest.approx(average)
    confidence = disalign.fit(draw(), fitted_once, 0.7).calibration.confidence_score(TEST.x).detach().flatten()
    count = np.histogram(confidence, 15, (0, 1), weights=test.weights)[0]
    assert found["disalign"]["confidence"]["count"] == count.tolist()
    assert found["disalign"]["confidence"]["mean"] == pytest.approx(np.average(confidence, weights=test.weights))


# ---------------------------------------------------------------------------------------------------- the comparison


def methods_of(compared):
    (run,) = compared["runs"]
    return run["methods"]


def test_stage_one_and_logit_adjustment_by_hand(compared):
    scores, y = classifier()(TEST.x).detach().numpy(), TEST.y.numpy()
    for name, adjusted in (("stage_one", scores), ("logit_adjust", scores - np.log(np.array(COUNTS) / 206))):
        figures = methods_of(compared)[name]["figures"]
        assert figures["average"] == pytest.approx(100 * accuracy_score(y, adjusted.argmax(1)))
        assert figures["nll"] == pytest.approx(log_loss(y, torch.tensor(adjusted).double().softmax(1)), rel=1e-4)


def test_disalign_is_the_fits(compared):
    fitted = disalign.fit(draw(), classifier(), 1.0)
    found = methods_of(compared)["disalign"]
    best = fitted(TEST.x).argmax(1)
    accuracy = [100 * float((best[TEST.y == k] == k).double().mean()) for k in range(4)]
    assert found["per_class"]["accuracy"] == pytest.approx(accuracy)
    assert found["margin"] == pytest.approx(fitted.calibration.margin.tolist(), abs=1e-6)
    confidence = fitted.calibration.confidence_score(TEST.x).detach().numpy()
    assert found["confidence"]["count"] == np.histogram(confidence, 15, (0, 1))[0].tolist()
    assert found["confidence"]["mean"] == pytest.approx(confidence.mean())
    assert found["setting"] == {"rho": 1.0}


def test_rho_0_is_the_fit_without_balance(compared):
    fitted = disalign.fit(draw(), classifier(), 0.0)
    figures = methods_of(compared)["rho_0"]["figures"]
    assert figures["average"] == 100 * accuracy_score(TEST.y, fitted(TEST.x).argmax(1))


def test_the_dial_goes_from_stage_one_to_disalign_and_the_sweep_through_rho(compared):
    (run,) = compared["runs"]
    dial = {one["value"]: one["figures"] for one in run["dial"]}
    assert dial[0.0] == run["methods"]["stage_one"]["figures"]
    assert dial[1.0] == run["methods"]["disalign"]["figures"]
    sweep = {one["value"]: one["figures"] for one in run["sweep"]}
    assert sweep[0.0] == run["methods"]["rho_0"]["figures"]
    assert sweep[1.0] == run["methods"]["disalign"]["figures"]
    assert sweep[2.0]["few"] > sweep[0.0]["few"]


def test_the_bound_learns_from_balanced_features(compared):
    expected = disalign.methods.crt(draw([60] * 4, 2), classifier(), 0.0)
    figures = methods_of(compared)["bound"]["figures"]
    assert figures["average"] == 100 * accuracy_score(TEST.y, expected(TEST.x).argmax(1))


def test_a_classifier_learnt_elsewhere_stands_beside(compared):
    found = methods_of(compared)["another"]
    assert found["title"] == "another"
    assert found["seconds"] is None
    assert "another" in table(compared)


def test_a_comparison_is_json_without_nan(compared):
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared
    assert compared["group_of"] == ["many", "medium", "few", "few"]
    assert compared["class_counts"] == COUNTS
    assert compared["classes"] == list("abcd")


def test_the_table_has_mean_spread_and_gain_of_several_stage_ones(compared):
    other = json.loads(json.dumps(compared))
    for found in other["runs"][0]["methods"].values():
        found["figures"]["average"] += 3 if found["title"] == "DisAlign" else 1
    text = table(merged([compared, other]))
    line = next(line for line in text.splitlines() if line.startswith("DisAlign   "))
    own = methods_of(compared)["disalign"]["figures"]["average"]
    before = methods_of(compared)["stage_one"]["figures"]["average"]
    spread = statistics.stdev([own, own + 3])
    assert f"{own + 1.5:.1f} +- {spread:.1f}" in line
    gains = [own - before, own - before + 2]
    assert f"{statistics.mean(gains):+.1f} +- {statistics.stdev(gains):.1f}" in line
    assert "mean +- standard deviation of 2 stage ones" in text


def test_the_table_rounds_percent_to_a_tenth_and_nats_to_a_hundredth(compared):
    line = next(line for line in table(compared).splitlines() if line.startswith("DisAlign   "))
    figures = methods_of(compared)["disalign"]["figures"]
    assert f" {figures['balanced']:.1f} " in line
    assert f" {figures['ece']:.1f}  {figures['nll']:.2f} " in line


def test_the_table_shows_all_settings_that_were_chosen(compared):
    other = json.loads(json.dumps(compared))
    methods_of(other)["tau_normalize"]["setting"]["tau"] = 0.5
    assert re.search("^tau-normalisation +tau 0.5/1 ", table(merged([compared, other])), re.MULTILINE)
    assert re.search("^tau-normalisation +tau 1 ", table(merged([compared, compared])), re.MULTILINE)


def test_stage_ones_of_other_training_sets_are_not_averaged(compared):
    with pytest.raises(InputError, match="expected comparisons of the same class counts"):
        merged([compared, compared | {"class_counts": COUNTS[::-1]}])


def test_settings_are_chosen_on_the_validation_split_alone():
    validation = draw([80, 30, 12, 8], 3)  # long-tailed: the average would choose otherwise
    options = {"methods": ["tau_normalize"], "validation": validation, "rho": 1.0}
    found = disalign.compare(draw(), TEST, classifier(), **options)
    shuffled = Features.from_arrays(TEST.x, TEST.y.roll(7))
    assert {name: one["setting"] for name, one in methods_of(found).items()} == {
        name: one["setting"]
        for name, one in methods_of(disalign.compare(draw(), shuffled, classifier(), **options)).items()
    }
    assert found["settings"] == "best balanced accuracy on 130 others"
    z, y = classifier()(validation.x).detach().numpy(), validation.y.numpy()
    best = {
        strength: balanced_accuracy_score(y, (z - strength * np.log(COUNTS)).argmax(1))
        for strength in METHODS["logit_adjust"].grid
    }
    chosen = methods_of(found)["logit_adjust"]["setting"]["strength"]
    assert best[chosen] == max(best.values()) > min(best.values())
    average = {s: accuracy_score(y, (z - s * np.log(COUNTS)).argmax(1)) for s in best}
    assert max(average, key=average.get) != chosen


@pytest.mark.parametrize(("shift", "end"), [(-1.0, 0), (1.5, -1)])
def test_both_ends_of_the_grid_are_tried(shift, end, fitted_once):
    """Scores adjusted by a whole strength already, and scores that are that much further from it."""
    shifted = copy.deepcopy(fitted_once)
    with torch.no_grad():
        shifted.bias += shift * torch.tensor(COUNTS).log()
    chosen = comparison.choose(Problem(draw(), shifted), ["logit_adjust"], draw([30] * 4, 3))
    assert chosen == {"logit_adjust": METHODS["logit_adjust"].grid[end]}


@pytest.mark.parametrize("rho", [0.1, 1.35])
def test_the_rho_of_the_problem_is_tried_too(rho, fitted_once, monkeypatch):
    """Below and between those of the grid."""
    tried, learn = {}, comparison.learnt

    def recorded(name, problem, value):
        tried.setdefault(name, []).append(value)
        return learn(name, problem, value)

    monkeypatch.setattr(comparison, "learnt", recorded)
    comparison.choose(Problem(draw(), fitted_once, rho), ["disalign_one", "tau_normalize"], TEST)
    assert tried["disalign_one"] == sorted([0.5, 0.8, 1.0, 1.2, 1.5, rho])
    assert tried["tau_normalize"] == [0.25, 0.5, 0.75, 1.0]


def test_a_probe_can_be_trained_first():
    found = disalign.compare(draw(), TEST, "linear", ["disalign"])
    expected = disalign.compare(draw(), TEST, classifier(), ["disalign"])
    assert methods_of(found)["stage_one"]["figures"] == pytest.approx(methods_of(expected)["stage_one"]["figures"])


def test_all_classifiers_that_are_trained_have_the_given_penalty():
    """scikit-learn's logistic regression: stage one, cRT with its weights, and stage one of the folds."""
    train, C = draw(), 0.02
    names = ["crt", "disalign_cross_fit"]
    found = methods_of(disalign.compare(train, TEST, "linear", names, rho=1.0, C=C, dial=()))
    balance = {label: 1 / count for label, count in enumerate(COUNTS)}
    mean = np.average(list(balance.values()), weights=COUNTS)
    weights = {"stage_one": None, "crt": {label: weight / mean for label, weight in balance.items()}}
    for name, weight in weights.items():
        model = LogisticRegression(C=C, class_weight=weight, tol=1e-8, max_iter=10_000).fit(train.x, train.y)
        loss = log_loss(TEST.y, model.predict_proba(TEST.x))
        assert found[name]["figures"]["nll"] == pytest.approx(loss, rel=1e-3)
    expected = disalign.fit(train, "linear", 1.0, C=C, confidence="one", anchor="logit_adjust").calibration
    assert found["disalign_cross_fit"]["margin"] == pytest.approx(expected.margin.tolist(), abs=1e-4)
    with pytest.raises(InputError, match="expected a finite C > 0, got 0"):
        disalign.compare(train, TEST, "linear", C=0)


def test_stage_ones_figures_on_its_training_set_are_told(compared):
    (run,), truth = compared["runs"], draw().y.numpy()
    best = classifier()(draw().x).argmax(1).numpy()
    balanced = 100 * balanced_accuracy_score(truth, best)
    assert run["train"]["balanced"] == pytest.approx(balanced)
    assert run["train"]["average"] == pytest.approx(100 * accuracy_score(truth, best))
    assert f"stage one gets {balanced:.1f} % of its training set right, averaged over the classes" in table(compared)


def test_cosine_classifiers():
    found = disalign.compare(draw(), TEST, "cosine")
    assert "tau_normalize" not in methods_of(found)
    assert methods_of(found)["crt"]["figures"]["average"] > 50


def test_what_fit_warns_of_is_said_once_and_kept():
    train = draw([5, 4, 3, 2])
    with pytest.warns(UserWarning, match="memorised examples") as told:
        found = disalign.compare(train, TEST, disalign.fit(train, "linear", cross_fit=0, C=100.0))
    about = [str(one.message) for one in told if "memorised examples" in str(one.message)]
    assert found["runs"][0]["notes"] == about[-1:]


def test_the_given_classifier_is_left_as_it_is():
    given, other = disalign.fit(draw(), "linear", cross_fit=0), nn.Linear(WIDTH, 4)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    disalign.compare(draw(), TEST, given, ["all"], others={"other": other})
    assert other.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert given.calibration.margin.requires_grad


def test_a_detectors_methods_learn_beside_its_background():
    y = np.repeat(range(5), [100, 30, 10, 4, 400])
    x = 0.8 * np.random.default_rng(9).normal(size=(5, WIDTH))[y] + np.random.default_rng(0).normal(
        size=(len(y), WIDTH)
    )
    rows = Features.from_arrays(x.astype(np.float32), y, class_counts=[100, 30, 10, 4], background=True)
    torch.manual_seed(0)
    problem = Problem(rows, nn.Linear(WIDTH, 5), image_counts=torch.tensor([80, 25, 9, 4]))
    assert problem.task == "detection"
    found, _ = candidates(problem, chosen_methods(["all"], "detection", False), dial=())
    for one in found:
        scores = one.classifier(rows.x)
        assert torch.equal(scores[:, 4], problem.classifier(rows.x)[:, 4]), one.name
        assert scores.isfinite().all()
    norcal = next(one for one in found if one.name == "norcal").calibration
    assert norcal.margin.numpy() == pytest.approx(-0.6 * np.log([80, 25, 9, 4]), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["tau_normalize", "logit_adjust", "vs", "lws", "marc", "disalign_one", "disalign_shrunk"]
)
def test_a_method_of_confidence_one_folds_into_a_stock_classifier(name):
    problem = Problem(draw(), classifier())
    found = comparison.learnt(name, problem, comparison.setting_of(name, problem)).classifier
    torch.testing.assert_close(disalign.fold_classifier(found)(TEST.x), found(TEST.x), rtol=1e-5, atol=1e-5)


def test_a_calibration_of_another_classifier_is_refused():
    calibration = disalign.methods.logit_adjust(nn.Linear(WIDTH, 3), [3, 2, 1])
    with pytest.raises(InputError, match="expected a calibration of 4 classes for this classifier, got 3"):
        disalign.modules.with_calibration(CosineClassifier(WIDTH, 4), calibration)
