"""A map shows where a label comes from, and follows the weights."""

import numpy as np
import pytest
import torch
from narrow import PROCESSOR, tiny_model
from PIL import Image
from scipy.stats import spearmanr

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.saliency import choose_films, grad_cam, salient_films
from cxr_backbone.weights import load_inception_v3


@pytest.fixture(scope="module")
def model():
    return tiny_model(labels=3).eval()


def noise(films=2, size=75):
    return torch.randn(films, 1, size, size, generator=torch.Generator().manual_seed(0))


def test_a_map_covers_the_film_and_goes_up_to_one(model):
    maps = grad_cam(model, noise(4, 107), [0, 1, 2, 0])
    assert maps.shape == (4, 107, 107) and maps.dtype == np.float32
    assert maps.min() >= 0 and set(maps.max(axis=(1, 2)).tolist()) <= {0.0, 1.0} and maps.max() == 1


def test_a_map_is_the_same_every_time(model):
    assert np.array_equal(grad_cam(model, noise(), [0, 1]), grad_cam(model, noise(), [0, 1]))


def test_each_label_has_a_map_of_its_own(model):
    first, second = grad_cam(model, noise(1).repeat(2, 1, 1, 1), [0, 1])
    assert not np.allclose(first, second)


def test_a_film_has_the_same_map_alone_and_among_others(model):
    together = grad_cam(model, noise(3), [0, 1, 2])
    assert np.allclose(grad_cam(model, noise(3)[1:2], [1])[0], together[1], atol=1e-4)


def test_a_label_that_nothing_speaks_for_has_an_empty_map():
    model = tiny_model()
    torch.nn.init.constant_(model.classifier.output_layer.weight, -1)  # features are never negative
    assert not grad_cam(model, noise(), [0, 1]).any()


def test_a_map_finds_the_square_that_the_head_reads():
    """A square raises some features where it lies. A head that reads these points at the square."""
    model = tiny_model().eval()
    films = torch.zeros(2, 1, 299, 299)
    films[0, :, 30:110, 30:110] = films[1, :, 190:270, 190:270] = 3
    with torch.no_grad():
        empty, *features = (model.cxr_inception(film[None]).pooler_output[0] for film in (films[0] * 0, *films))
        raised = torch.stack(features).mean(dim=0) - empty
        model.classifier.output_layer.weight[1] = raised.clamp(min=0)
    upper_left, lower_right = grad_cam(model, films, [1, 1])
    assert all(30 <= place <= 110 for place in np.unravel_index(upper_left.argmax(), upper_left.shape))
    assert all(190 <= place <= 270 for place in np.unravel_index(lower_right.argmax(), lower_right.shape))


def test_random_weights_give_another_map(shared):
    """The sanity check of Adebayo et al. 2018, "Sanity Checks for Saliency Maps", on real weights and real films: a map
    that survives random weights is a drawing of the film, not of what the model has learnt."""
    weights = shared / "weights/inception_v3_nsfwjs_f16.safetensors"
    options = {"image_mean": 0.0, "image_std": 1.0, "avg_pool_count_include_pad": False, "image_size": 224}
    backbone, processor = load_inception_v3(weights, **options)
    normal, ill = (
        processor([Image.open(path) for path in sorted((shared / folder).glob("*"))[::60]], return_tensors="pt")
        for folder in ("data/kermany224/test/NORMAL", "data/kermany224/test/PNEUMONIA")
    )
    maps = []
    for state in (backbone.state_dict(), None):
        torch.manual_seed(0)
        model = CXRInceptionForImageClassification(backbone.config).eval()
        if state is not None:
            model.cxr_inception.load_state_dict(state)
        with torch.no_grad():  # a head that reads what is raised in ill films
            means = [model.cxr_inception(**films).pooler_output.mean(dim=0) for films in (normal, ill)]
            model.classifier.output_layer.weight[1] = (means[1] - means[0]).clamp(min=0)
        maps.append(grad_cam(model, ill.pixel_values, [1] * len(ill.pixel_values)))
    agreement = [spearmanr(one.ravel(), other.ravel()).statistic for one, other in zip(*maps, strict=True)]
    assert np.mean(agreement) < 0.2 and np.max(agreement) < 0.5


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    model.freeze_backbone("stage2")
    model.train()
    model.classifier.eval()
    films = noise()
    before = [module.training for module in model.modules()], [weight.requires_grad for weight in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        grad_cam(model, films, [0, 1])
    assert before == ([module.training for module in model.modules()], [w.requires_grad for w in model.parameters()])
    assert all(weight.grad is None for weight in model.parameters()) and not films.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_model_has_maps_too():
    model = tiny_model().requires_grad_(False)
    assert grad_cam(model, noise(), [0, 1]).any()


@pytest.mark.parametrize("targets", [[0], [0, 3], [0, -1]])
def test_a_target_that_does_not_fit_is_refused(model, targets):
    with pytest.raises(ValueError, match=r"targets is .*; expected 2, one a film, from 0 to 2\."):
        grad_cam(model, noise(2), targets)


def predictions_of(scores, labels, names=("normal", "ill")):
    """Films film0, film1, ... of the given probabilities of the last of two classes."""
    scores = np.array(scores)
    logits = np.stack([np.zeros(len(scores)), np.log(scores / (1 - scores))], axis=1)
    ids = [f"film{film}" for film in range(len(scores))]
    return Predictions(list(names), np.array(labels), logits, ids, [None] * len(ids))


SCORES, LABELS = [0.99, 0.02, 0.9, 0.97, 0.04, 0.51, 0.48, 0.01], [1, 0, 1, 0, 1, 1, 0, 0]


def test_the_surest_of_both_answers_are_chosen_and_the_least_sure():
    chosen = choose_films(predictions_of(SCORES, LABELS), "ill", number=2)
    assert chosen == {"surest right": [0, 7], "surest wrong": [3, 4], "least sure": [5, 6]}


def test_sure_is_far_from_the_threshold():
    chosen = choose_films(predictions_of(SCORES, LABELS), "ill", threshold=0.9, number=1)
    assert chosen == {"surest right": [0], "surest wrong": [3], "least sure": [2]}


def test_where_one_answer_is_missing_the_other_fills_up():
    chosen = choose_films(predictions_of([0.9, 0.8, 0.7], [1, 1, 0]), "ill", number=2)
    assert chosen == {"surest right": [0, 1], "surest wrong": [2], "least sure": []}


def test_unknown_findings_are_not_chosen():
    labels, logits = np.array([[1.0, np.nan], [0.0, 1.0]]), np.array([[2.0, 3.0], [-2.0, 1.0]])
    predictions = Predictions(["mass", "edema"], labels, logits, ["a", "b"], [None, None])
    assert choose_films(predictions, "edema") == {"surest right": [1], "surest wrong": [], "least sure": []}


def test_a_chosen_film_says_what_is_true_what_was_called_and_what_its_map_speaks_for():
    predictions = predictions_of(SCORES, LABELS)
    chosen = choose_films(predictions, "ill", number=2)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 75, 75), np.uint8)
    pixel_values = PROCESSOR(list(pixels), return_tensors="pt").pixel_values
    films = salient_films(tiny_model(), predictions, "ill", chosen, pixels, pixel_values)
    assert [film.image_id for film in films] == ["film0", "film7", "film3", "film4", "film5", "film6"]
    surest_wrong = films[3]
    assert (surest_wrong.kind, surest_wrong.truth, surest_wrong.called) == ("surest wrong", "ill", "normal")
    assert surest_wrong.explained == "normal" and surest_wrong.score == pytest.approx(0.04)
    assert np.array_equal(surest_wrong.pixels, pixels[3])
    assert np.array_equal(surest_wrong.map, grad_cam(tiny_model(), pixel_values, [1, 0, 1, 0, 1, 0])[3])


def test_a_finding_that_was_not_called_is_explained_by_what_speaks_for_it():
    labels, logits = np.array([[0.0, 0.0]]), np.array([[-2.0, -3.0]])
    predictions = Predictions(["mass", "edema"], labels, logits, ["a"], [None])
    model = tiny_model(problem_type="multi_label_classification")
    pixels = np.zeros((1, 75, 75), np.uint8)
    (film,) = salient_films(model, predictions, "edema", {"surest right": [0]}, pixels, noise(1))
    assert (film.truth, film.called, film.explained) == ("no edema", "no edema", "edema")
