"""Phase one finds the best head there is for frozen features; phase two trains each stage at its own rate."""

import copy
import logging

import pytest
import torch
from narrow import PROCESSOR, accelerator, all_pixel_values, deaf_interruption, in_use, tiny_model, training_run
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from cxr_backbone import CXRInceptionConfig
from cxr_backbone.training.arguments import FineTuningArguments, FrozenArguments
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.nonfinite import NonfiniteError
from cxr_backbone.training.phases import fine_tune, fit_head, parameter_groups
from cxr_backbone.training.state import read_log

MIDDLE = 0.1  # the L2 strength that suits the made-up features below
TOLERANCE = 3e-3  # of probabilities; how close the minimiser comes


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
    """The log of `fit_head`. Before the two of validation, `features` has values and labels of each view."""
    lines, arguments = [], FrozenArguments(l2_strengths=strengths, **settings)
    *views, validation = zip(features[::2], features[1::2], strict=True)
    fit_head(model, views, validation, arguments, lambda **line: lines.append(line))
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


def test_features_that_are_no_numbers_are_refused(features):
    features[2][:, 0] = float("nan")  # of validation: no strength can be chosen by it
    with pytest.raises(NonfiniteError, match=r"no number at any of frozen\.l2_strengths"):
        fit(tiny_model(3), features, [1e-2, MIDDLE])


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


def test_a_head_on_several_views_is_a_head_on_all_their_images(features):
    values, labels, *validation = features
    others = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    model, strength = tiny_model(3), 1e-1
    fit(model, (values, labels, others, labels, *validation), [strength])
    seen = scaled(torch.cat([values, others]), values).double().numpy()
    reference = LogisticRegression(C=1 / (strength * len(seen)), tol=1e-8, max_iter=10_000)
    reference.fit(seen, torch.cat([labels, labels]).numpy())
    expected = reference.predict_proba(scaled(validation[0], values).double().numpy())
    torch.testing.assert_close(probabilities(model, validation[0]), torch.from_numpy(expected), rtol=0, atol=TOLERANCE)


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


def plain_and_synchronised(model):
    """A copy in use, and one more with BatchNorm over all processes."""
    plain = in_use(copy.deepcopy(model))
    return plain, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))


def test_all_batch_norm_layers_are_made_one_over_all_processes_and_a_single_one_trains_as_before(phantoms, tmp_path):
    rows, logs = (phantoms["train"].select(range(8)), phantoms["validation"]), []
    for over_all in (False, True):
        model, prepared = plain_and_synchronised(tiny_model())[0], accelerator()
        layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        arguments = FineTuningArguments(batch_size=4, epochs=2, sync_batch_norm=over_all)
        run = training_run(tmp_path / str(over_all), prepared, fine_tuning=arguments)
        fine_tune(model, *rows, PROCESSOR, prepared, arguments, run=run, interruption=deaf_interruption())
        converted = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        assert converted == (layers if over_all else 0) and layers > 90
        logs.append(read_log(run.path))
    assert logs[0] == logs[1]


def test_a_model_with_such_layers_answers_the_same(phantoms):
    pixel_values = all_pixel_values(phantoms["test"].select(range(4)))
    with torch.no_grad():
        plain, over_all = (model.eval()(pixel_values).logits for model in plain_and_synchronised(tiny_model()))
    assert torch.equal(plain, over_all)


def test_gradient_checkpointing_moves_their_statistics_once(phantoms):
    pixel_values = all_pixel_values(phantoms["test"].select(range(4)))
    models = plain_and_synchronised(tiny_model())
    models[1].activation_checkpointing_enable()
    for model in models:
        model.train()(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    plain, checkpointed = (dict(model.named_buffers()) for model in models)
    for name, buffer in plain.items():
        torch.testing.assert_close(checkpointed[name], buffer, rtol=0, atol=1e-6)
