"""Phase one finds the best head there is for frozen features; phase two keeps the best model it comes by."""

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.decoding import decode_once, stack_pixels
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training import loop
from cxr_backbone.training.arguments import FineTuningArguments, FrozenArguments
from cxr_backbone.training.batches import to_images, to_pixel_values
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.loop import predict, train
from cxr_backbone.training.phases import fine_tune, fit_head, parameter_groups

MIDDLE = 0.1  # the L2 strength that suits the made-up features below
TOLERANCE = 3e-3  # of probabilities; how close the minimiser comes
PROCESSOR = CXRInceptionImageProcessor(size={"height": 75, "width": 75})


def tiny_model(labels=2, **settings):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "problem_type": "single_label_classification"} | settings
    names = {index: f"class {index}" for index in range(labels)}
    return CXRInceptionForImageClassification(
        CXRInceptionConfig(image_size=75, depth_multiplier=0.1, id2label=names, **settings)
    )


def all_pixel_values(rows):
    pixels = torch.from_numpy(stack_pixels(list(rows))).unsqueeze(1)
    return to_pixel_values(to_images(pixels), PROCESSOR)


def accelerator(accumulation=1):
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=loaders)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {split: decode_once(rows, 75, cache) for split, rows in load_synthetic(40, image_size=75).items()}


# Phase one


@pytest.fixture
def features():
    """Made-up features of 150 training and 100 validation images in three classes that overlap."""
    width = CXRInceptionConfig(depth_multiplier=0.1).hidden_sizes[-1]
    generator = torch.Generator().manual_seed(1)
    spread = torch.full((width,), 0.3)
    spread[:3] = 2.0  # what tells the classes apart
    values = torch.randn(250, width, generator=generator) * spread
    scores = values[:, :3] + 1.5 * torch.randn(250, 3, generator=generator)
    return values[:150] + 1, scores[:150].argmax(dim=1), values[150:] + 1, scores[150:].argmax(dim=1)


def fit(model, features, strengths, **settings):
    """The log of `fit_head`."""
    lines = []
    fit_head(model, *features, FrozenArguments(l2_strengths=strengths, **settings), lambda **line: lines.append(line))
    return lines


@torch.no_grad()
def probabilities(model, values):
    return model.eval().classifier(values).double().softmax(dim=1)


def scaled(values, like):
    """Centred, and divided by one number, as if all features of `like` together had unit variance."""
    return (values - like.mean(dim=0)) / like.var(dim=0).mean().sqrt()


@pytest.mark.parametrize("strength", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("labels", [2, 3])
def test_a_linear_head_is_scikit_learns_logistic_regression(features, labels, strength):
    train_values, train_labels, values, validation_labels = features
    train_labels, validation_labels = train_labels.clamp(max=labels - 1), validation_labels.clamp(max=labels - 1)
    model = tiny_model(labels)
    fit(model, (train_values, train_labels, values, validation_labels), [strength])

    # Two classes are one vector of weights to scikit-learn and two opposite ones, half as long, to us.
    penalty = strength / 2 if labels == 2 else strength
    reference = LogisticRegression(C=1 / (penalty * len(train_values)), tol=1e-8, max_iter=10_000)
    reference.fit(scaled(train_values, train_values).double().numpy(), train_labels.numpy())
    expected = reference.predict_proba(scaled(values, train_values).double().numpy())
    torch.testing.assert_close(probabilities(model, values), torch.from_numpy(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strength", [1e-5, 1e-3])
def test_a_weak_penalty_is_minimised_too(features, strength):
    """Where probabilities near 0 and 1 say little, the loss with its penalty is scikit-learn's."""
    values, labels = scaled(features[0], features[0]).double(), features[1]
    model = tiny_model(3)
    fit(model, features, [strength])
    reference = LogisticRegression(C=1 / (strength * len(values)), tol=1e-8, max_iter=100_000)
    reference.fit(values.numpy(), labels.numpy())

    head = model.classifier.output_layer
    weights = (head.weight.detach().double() * features[0].var(dim=0).mean().sqrt(), torch.from_numpy(reference.coef_))
    found = (probabilities(model, features[0]), torch.from_numpy(reference.predict_proba(values.numpy())))
    ours, optimum = (
        F.nll_loss(probability.log(), labels).item() + strength / 2 * weight.square().sum().item()
        for probability, weight in zip(found, weights, strict=True)
    )
    assert optimum - 1e-6 < ours < optimum + 1e-4


def test_the_strength_with_the_lowest_validation_loss_is_kept(features):
    model = tiny_model(3)
    lines = fit(model, features, [1e-3, 1e2, MIDDLE])
    assert [line["l2"] for line in lines] == [1e2, MIDDLE, 1e-3]
    best = min(lines, key=lambda line: line["validation_loss"])
    assert best["l2"] == MIDDLE

    alone = tiny_model(3)
    fit(alone, features, [MIDDLE])
    torch.testing.assert_close(
        probabilities(model, features[2]), probabilities(alone, features[2]), rtol=0, atol=TOLERANCE
    )


def test_the_log_says_the_losses_of_the_head_that_is_left(features):
    """The scaling is folded in exactly: on raw features the model has the losses that the scaled ones had."""
    model = tiny_model(3)
    (line,) = fit(model, features, [1e-2])
    for values, labels, logged in zip(features[::2], features[1::2], ("train_loss", "validation_loss"), strict=True):
        loss = F.nll_loss(probabilities(model, values).log(), labels).item()
        assert loss == pytest.approx(line[logged], abs=1e-6)
    assert 1 < line["iterations"] < 1000 and line["phase"] == "frozen"


@pytest.mark.parametrize(
    "strengths, warned",
    [([1e-3, MIDDLE, 1e2], False), ([MIDDLE, 1e2], True), ([1e-4, 1e-3, MIDDLE], True), ([MIDDLE], False)],
)
def test_a_best_strength_at_the_end_of_the_range_is_said(features, caplog, strengths, warned):
    with caplog.at_level(logging.WARNING):
        fit(tiny_model(3), features, strengths)
    assert ["frozen.l2_strengths" in message for message in caplog.messages] == [True] * warned


def test_a_head_with_hidden_layers_learns_what_a_line_cannot():
    width = CXRInceptionConfig(depth_multiplier=0.1).hidden_sizes[-1]
    values = torch.randn(400, width, generator=torch.Generator().manual_seed(0)) * 0.05 + 5
    values[:, :2] = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) * 2 + 3
    labels = ((values[:, 0] > 3) ^ (values[:, 1] > 3)).long()
    data = values[:200], labels[:200], values[200:], labels[200:]

    def accuracy(hidden_sizes):
        model = tiny_model(head_hidden_sizes=hidden_sizes)
        fit(model, data, [1e-4])
        return (probabilities(model, data[2]).argmax(dim=1) == data[3]).double().mean()

    assert accuracy([]) < 0.65 < 0.85 < accuracy([16])


def test_a_feature_that_hardly_varies_stays_unimportant(features):
    """It was silent on the training images; when it speaks on a new one, the answer hardly changes."""
    values = features[0].clone()
    values[:, 5] = 0
    model = tiny_model(3)
    fit(model, (values, *features[1:]), [1e-4])
    spoken = values.clone()
    spoken[:, 5] = 0.01
    torch.testing.assert_close(probabilities(model, spoken), probabilities(model, values), rtol=0, atol=1e-3)


def test_the_backbone_and_the_given_features_are_left_alone(features):
    model = tiny_model(3)
    before = copy.deepcopy(model.cxr_inception.state_dict()), [tensor.clone() for tensor in features]
    fit(model, features, [1e-2])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.cxr_inception.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(features, before[1], strict=True))


def test_label_smoothing_is_of_the_training_loss_and_not_of_the_choice(features):
    model = tiny_model(3, label_smoothing=0.3)
    (line,) = fit(model, features, [1e-2])
    loss = F.nll_loss(probabilities(model, features[2]).log(), features[3]).item()
    assert loss == pytest.approx(line["validation_loss"], abs=1e-6)
    plain = tiny_model(3)
    fit(plain, features, [1e-2])
    assert probabilities(model, features[0]).max() < probabilities(plain, features[0]).max()


def test_a_head_on_cached_features_is_the_head_trained_the_slow_way(phantoms, tmp_path):
    """The slow way: every step sends every image through the whole model, in train mode, backbone frozen."""
    rows = phantoms["train"].select(range(16))
    model = tiny_model()
    extracted, labels = extract_features(
        model.cxr_inception, rows, PROCESSOR, accelerator(), batch_size=8, cache_dir=tmp_path
    )
    slow, head = copy.deepcopy(model.cxr_inception), nn.Linear(extracted.shape[1], 2)
    fit(model, (extracted, labels, extracted, labels), [0.1])

    slow.freeze_backbone()
    slow.train()
    pixel_values = all_pixel_values(rows)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def logits():
        return head(scaled(slow(pixel_values).pooler_output, extracted))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(), labels) + 0.1 / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        expected, found = logits().softmax(dim=1), model.eval()(pixel_values).logits.softmax(dim=1)
    assert expected.std(dim=0).min() > 0.05  # something was learnt
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture
def findings(features):
    """The same features with two findings, of which a tenth is unknown."""
    train_values, train_labels, values, labels = features

    def two_findings(labels):
        both = torch.stack([(labels == 0).float(), (labels == 1).float()], dim=1)
        both[::10, 0] = torch.nan
        return both

    return train_values, two_findings(train_labels), values, two_findings(labels)


def test_findings_are_a_logistic_regression_each_on_the_films_where_they_are_known(findings):
    train_values, train_labels, values, _ = findings
    model = tiny_model(2, problem_type="multi_label_classification")
    fit(model, findings, [1e-2])
    with torch.no_grad():
        found = model.eval().classifier(values).double().sigmoid()
    num_known = (~train_labels.isnan()).sum()  # the loss is the mean over all that is known, of both findings
    for finding in range(2):
        known = ~train_labels[:, finding].isnan()
        reference = LogisticRegression(C=1 / (1e-2 * num_known.item()), tol=1e-8, max_iter=10_000)
        reference.fit(scaled(train_values, train_values)[known].double().numpy(), train_labels[known, finding].numpy())
        expected = reference.predict_proba(scaled(values, train_values).double().numpy())[:, 1]
        torch.testing.assert_close(found[:, finding], torch.from_numpy(expected), rtol=0, atol=TOLERANCE)


def test_the_logged_loss_of_findings_leaves_the_unknown_out(findings):
    model = tiny_model(2, problem_type="multi_label_classification")
    (line,) = fit(model, findings, [1e-2])
    with torch.no_grad():
        scores = model.eval().classifier(findings[2]).double().sigmoid()
    truth = findings[3]
    given_to_the_truth = torch.where(truth == 1, scores, 1 - scores)[~truth.isnan()]
    assert line["validation_loss"] == pytest.approx(-given_to_the_truth.log().mean().item(), abs=1e-5)


# Phase two


@pytest.mark.parametrize("settings", [{}, {"head_hidden_sizes": [8], "use_auxiliary_head": True}])
def test_every_trainable_parameter_is_in_one_group(settings):
    model = tiny_model(**settings)
    grouped = [
        id(parameter) for group in parameter_groups(model, FineTuningArguments()) for parameter in group["params"]
    ]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_rates_fall_by_the_same_factor_from_the_head_to_the_stem():
    model = tiny_model(use_auxiliary_head=True)
    groups = parameter_groups(model, FineTuningArguments(learning_rate=0.1, stage_decay=0.5))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    stages = model.cxr_inception.encoder.stages
    below = [stages[name] for name in ("stage4", "stage3", "stage2", "stage1", "stem")]
    for module, depth in [(model.auxiliary_classifier, 0), *zip([model.classifier, *below], range(6), strict=True)]:
        assert {rates[id(parameter)] for parameter in module.parameters()} == {0.1 * 0.5**depth}


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model = tiny_model(head_hidden_sizes=[8])
    groups = parameter_groups(model, FineTuningArguments(weight_decay=0.3))
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decaying = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert decays[id(parameter)] == (0.3 if decaying else 0.0)


class Run:
    """A fine-tuning with its log and what it saved."""

    def __init__(self, phantoms, model=None, accumulation=1, method=fine_tune, seed=0, **arguments):
        self.model, self.lines, self.saved = model or tiny_model(), [], []
        self.accelerator = accelerator(accumulation)
        settings = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "ema_decay": 0.8, "patience": 100}
        settings["gradient_accumulation_steps"] = accumulation
        self.error = None
        try:
            method(
                self.model,
                phantoms["train"],
                phantoms["validation"],
                PROCESSOR,
                self.accelerator,
                FineTuningArguments(**(settings | arguments)),
                seed=seed,
                log=lambda **line: self.lines.append(line),
                save=lambda model: self.saved.append(copy.deepcopy(model.state_dict())),
            )
        except RuntimeError as error:
            self.error = str(error)

    @property
    def evaluations(self):
        return [line for line in self.lines if "validation_loss" in line]

    @property
    def steps(self):
        return [line for line in self.lines if "step" in line]


@pytest.fixture(scope="module")
def tuned(phantoms):
    return Run(phantoms, epochs=4)


def validation_loss(state_dict, phantoms):
    model = tiny_model()
    model.load_state_dict(state_dict)
    prepared = accelerator()
    logits, labels = predict(model, phantoms["validation"], PROCESSOR, prepared, batch_size=8)
    return F.cross_entropy(logits, labels).item()


def test_findings_are_fine_tuned_by_the_same_function():
    generator = np.random.default_rng(0)
    levels = [0, 100] * 16
    films = [generator.integers(level, level + 100, (75, 75), dtype=np.uint8) for level in levels]
    labels = [{"bright": float(level > 0), "never known": float("nan")} for level in levels]
    rows = Dataset.from_dict({"pixels": [film.tobytes() for film in films], "label": labels})
    model = tiny_model(2, problem_type="multi_label_classification")
    run = Run({"train": rows, "validation": rows}, model=model, epochs=12, augmentation=0.0)
    losses = [line["train_loss"] for line in run.steps]
    quarter = len(losses) // 4
    assert run.error is None and sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


def test_fine_tuning_learns_dark_from_bright():
    generator = np.random.default_rng(0)
    labels = [0, 1] * 16
    films = [generator.integers(100 * label, 100 * label + 100, (75, 75), dtype=np.uint8) for label in labels]
    dark_and_bright = Dataset.from_dict({"pixels": [film.tobytes() for film in films], "label": labels})
    run = Run({"train": dark_and_bright, "validation": dark_and_bright}, epochs=12, augmentation=0.0)
    losses = [line["train_loss"] for line in run.steps]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


def test_what_was_saved_last_has_the_lowest_validation_loss_of_the_log(tuned, phantoms):
    losses = [line["validation_loss"] for line in tuned.evaluations]
    assert min(losses) < losses[-1]  # the best is not the last
    assert validation_loss(tuned.saved[-1], phantoms) == pytest.approx(min(losses), abs=1e-6)
    records = [loss for index, loss in enumerate(losses) if loss < min([*losses[:index], float("inf")])]
    assert len(tuned.saved) == len(records)


def test_the_start_is_evaluated_and_saved_before_the_first_step(tuned):
    assert tuned.evaluations[0]["epoch"] == 0 and tuned.evaluations[0]["train_loss"] is None
    start = tiny_model().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in tuned.saved[0].items())


def test_the_log_has_each_step_and_each_evaluation(tuned, phantoms):
    steps_per_epoch = len(phantoms["train"]) // 8
    assert [line["step"] for line in tuned.steps] == list(range(4 * steps_per_epoch))
    assert [line["epoch"] for line in tuned.evaluations][::2] == [0, 1, 2, 3, 4]
    assert len(tuned.evaluations) == 1 + 4 * 2
    assert {line["phase"] for line in tuned.lines} == {"fine_tuning"}
    between = [line["train_loss"] for line in tuned.steps[: round(steps_per_epoch / 2)]]
    assert tuned.evaluations[1]["train_loss"] == pytest.approx(sum(between) / len(between), abs=1e-6)


def test_the_average_that_is_kept_is_not_the_raw_model(tuned):
    raw, kept = tuned.model.state_dict(), tuned.saved[-1]
    assert raw.keys() == kept.keys()
    changed = [name for name, tensor in kept.items() if not torch.equal(tensor, raw[name])]
    assert set(changed) >= {name for name in kept if name.endswith(("convolution.weight", "running_mean"))}


def test_the_seed_repeats_a_run_to_the_bit_and_another_changes_it(phantoms):
    runs = [Run(phantoms, epochs=1, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].lines == runs[1].lines != runs[2].lines
    raw = [run.model.state_dict() for run in runs]
    assert all(torch.equal(tensor, raw[1][name]) for name, tensor in raw[0].items())


def test_fine_tuning_that_never_helps_leaves_the_start(phantoms, monkeypatch):
    worse = iter([1.0, 0.5, 0.2, 0.1])

    def answer_less_and_less(model, films, *rest, batch_size):
        labels = torch.tensor(films["label"])
        return next(worse) * F.one_hot(labels, 2).float(), labels

    monkeypatch.setattr(loop, "predict", answer_less_and_less)
    run = Run(phantoms, epochs=1, evaluations_per_epoch=3)
    assert len(run.evaluations) == 4 and len(run.saved) == 1
    start = tiny_model().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in run.saved[0].items())


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_after_that_many_evaluations_without_a_lower_loss(phantoms, monkeypatch, patience):
    def answer_nothing(model, films, *rest, batch_size):
        return torch.zeros(len(films), 2), torch.tensor(films["label"])

    monkeypatch.setattr(loop, "predict", answer_nothing)
    run = Run(phantoms, epochs=50, patience=patience)
    assert len(run.evaluations) == 1 + patience
    assert len(run.steps) < 50 * len(phantoms["train"]) // 8


def train_frozen(to_stage, model, *rest, **keywords):
    """`fine_tune` for a model whose lower stages stay frozen."""
    model.freeze_backbone(to_stage)
    optimizer = torch.optim.AdamW(parameter_groups(model, rest[-1]))
    train(model, *rest, optimizer, lambda updates: LambdaLR(optimizer, lambda update: 1.0), **keywords)


def train_counting(counts, model, *rest, **keywords):
    """`fine_tune` that notes how many updates are announced and how many are made."""
    optimizer = torch.optim.AdamW(parameter_groups(model, rest[-1]))
    scheduler = LambdaLR(optimizer, lambda update: 1.0)

    def make_scheduler(updates):
        counts["announced"] = updates
        return scheduler

    train(model, *rest, optimizer, make_scheduler, **keywords)
    counts["scheduled"] = scheduler.last_epoch
    counts["made"] = {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("accumulation, an_epoch", [(1, 5), (2, 3), (5, 1), (7, 1)])
def test_accumulated_batches_make_one_update(phantoms, accumulation, an_epoch):
    """Five batches an epoch; the last ones of an epoch make an update of their own."""
    counts = {}
    run = Run(phantoms, accumulation=accumulation, method=partial(train_counting, counts), evaluations_per_epoch=2)
    assert len(phantoms["train"]) // 8 == 5 and len(run.steps) == 10
    assert counts == {"announced": 2 * an_epoch, "scheduled": 2 * an_epoch, "made": {2 * an_epoch}}


def test_a_frozen_stage_does_not_move_by_one_bit(phantoms):
    start = tiny_model().state_dict()
    run = Run(phantoms, epochs=1, method=partial(train_frozen, "stage1"), weight_decay=0.5)
    for states in (run.model.state_dict(), run.saved[-1]):
        frozen = [name for name in start if ".stem." in name or ".stage1." in name]
        assert any("running_mean" in name for name in frozen)
        assert all(torch.equal(states[name], start[name]) for name in frozen)
    later = [name for name in start if ".stage2." in name and name.endswith(("convolution.weight", "running_mean"))]
    assert later and not any(torch.equal(run.model.state_dict()[name], start[name]) for name in later)


def test_fine_tuning_unfreezes_what_phase_one_froze(phantoms):
    model = tiny_model()
    model.freeze_backbone()
    run = Run(phantoms, model=model, epochs=1, warmup_ratio=0.0)
    start, end = tiny_model().state_dict(), run.model.state_dict()
    stem = [name for name in start if ".stem." in name and name.endswith(("weight", "running_mean", "running_var"))]
    assert stem and not any(torch.equal(end[name], start[name]) for name in stem)


def test_gradient_checkpointing_gives_the_same_run(phantoms):
    plain, checkpointed = (Run(phantoms, epochs=1, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.error is None
    for one, other in zip(plain.steps, checkpointed.steps, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert checkpointed.evaluations[-1]["validation_loss"] == pytest.approx(
        plain.evaluations[-1]["validation_loss"], abs=1e-4
    )


def test_a_learning_rate_that_explodes_stops_the_run_and_leaves_what_was_saved(phantoms):
    run = Run(phantoms, learning_rate=1e30, warmup_ratio=0.0)
    assert run.error and "nan at step 1" in run.error and "fine_tuning.learning_rate" in run.error
    assert len(run.saved) == 1 and all(tensor.isfinite().all() for tensor in run.saved[0].values())


def test_a_model_that_starts_broken_is_never_saved(phantoms):
    model = tiny_model()
    nn.init.constant_(model.classifier.output_layer.bias, float("nan"))
    run = Run(phantoms, model=model)
    assert "nan at step 0" in run.error
    assert run.saved == []


def test_predictions_are_in_order_and_leave_the_mode_as_it_was(phantoms):
    model, prepared = tiny_model(dropout=0.5).train(), accelerator()
    logits, labels = predict(model, phantoms["test"], PROCESSOR, prepared, batch_size=4)
    assert model.training
    assert labels.tolist() == phantoms["test"]["label"][:]
    with torch.no_grad():
        expected = model.eval()(all_pixel_values(phantoms["test"])).logits
    assert len(logits) == len(phantoms["test"]) and len(logits) % 4 != 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
