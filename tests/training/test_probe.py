"""The linear probe: logistic regression as scikit-learn has it, folded into a layer, patients never in two folds."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from cxr_backbone.training.probe import STRENGTHS, fit_probe

WIDTH, IMAGES = 12, 300


@pytest.fixture
def films():
    """Features (images, 12) of which the first three tell the class, labels, and patients of two films each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) // 2 % 3
    features = torch.randn(IMAGES, WIDTH, generator=generator)
    features[:, :3] += 1.5 * torch.nn.functional.one_hot(labels, 3)
    return 50 + 7 * features, labels, [f"p{film // 2}" for film in range(IMAGES)]


def test_two_classes_get_logits_whose_difference_is_the_regression(films):
    features, labels, patients = films
    binary = (labels == 1).long()
    layer, (strength,) = fit_probe(features, binary, patients)
    with torch.no_grad():
        logits = layer(features)
    assert logits.shape == (IMAGES, 2)
    torch.testing.assert_close(logits.sum(dim=1), torch.zeros(IMAGES), atol=1e-4, rtol=0)
    assert roc_auc_score(binary, logits[:, 1] - logits[:, 0]) > 0.9
    assert strength in STRENGTHS


def test_mean_score_is_the_share_of_the_class(films):
    """What logistic regression with an intercept guarantees on the films it was fitted to."""
    features, labels, patients = films
    layer, _ = fit_probe(features, labels, patients)
    shares = layer(features).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=1e-3, rtol=0)


def test_a_finding_is_fitted_to_the_films_it_is_known_of(films):
    features, labels, patients = films
    findings = torch.stack([(labels == 0).float(), (labels == 1).float()], dim=1)
    findings[::3, 1] = float("nan")
    layer, strengths = fit_probe(features, findings, patients)
    alone, _ = fit_probe(features, findings[:, :1], patients)
    assert len(strengths) == 2
    torch.testing.assert_close(layer.weight[:1], alone.weight)
    known = ~findings[:, 1].isnan()
    assert roc_auc_score(findings[known, 1], layer(features[known])[:, 1].detach()) > 0.9


def test_noise_gets_the_strongest_regularisation():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(100, 50, generator=generator), torch.arange(100) % 2
    _, (strength,) = fit_probe(features, labels, [None] * 100)
    assert strength == min(STRENGTHS)


def test_patients_who_give_themselves_away_do_not_choose_the_strength(films):
    """Features that tell the patient and nothing of the class; only folds by patient see that they are worthless."""
    generator = torch.Generator().manual_seed(1)
    of_patient = torch.randn(40, 100, generator=generator).repeat_interleave(10, dim=0)
    labels = (torch.rand(40, generator=generator) < 0.5).long().repeat_interleave(10)
    patients = [f"p{film // 10}" for film in range(400)]
    _, (grouped,) = fit_probe(of_patient, labels, patients)
    _, (by_film,) = fit_probe(of_patient, labels, [None] * 400)
    assert grouped < by_film


def test_too_few_patients_for_the_folds_are_refused(films):
    features, labels, _ = films
    patients = [f"p{film % 2 if labels[film] == 1 else film}" for film in range(IMAGES)]
    with pytest.raises(ValueError, match="label 1 is seen in 2 patients; 5 folds"):
        fit_probe(features, (labels == 1).long(), patients)
