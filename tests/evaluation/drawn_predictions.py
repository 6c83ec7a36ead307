"""Predictions of models that never were, for tests that look at figures and pages."""

import numpy as np

from cxr_backbone import CXRInceptionConfig
from cxr_backbone.evaluation.operating_points import choose_operating_points
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.results import examine

FINDINGS = [
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
]


def two_classes(seed, films=120, skill=2.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(films) % 3 % 2
    evidence = skill * (2 * labels - 1) + 2 * generator.standard_normal(films)
    groups = {"sex": ["F" if film % 2 else "M" for film in range(films)]}
    return _predictions(["NORMAL", "PNEUMONIA"], labels, np.stack([-evidence, evidence], axis=1) / 2, groups)


def several_classes(seed, films=120, skill=2.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(films) % 4
    logits = generator.standard_normal((films, 4)) + skill * np.eye(4)[labels]
    return _predictions(["normal", "bacterial pneumonia", "viral pneumonia", "tuberculosis"], labels, logits)


def findings(seed, films=200, skill=1.0):
    """14 findings, from a third of the films with Atelectasis to none with Hernia; some are unknown."""
    generator = np.random.default_rng(seed)
    rates = np.append(np.linspace(0.33, 0.05, 13), 0)
    labels = (generator.random((films, 14)) < rates).astype(float)
    logits = generator.standard_normal((films, 14)) + skill * labels - 2
    labels[generator.random((films, 14)) < 0.05] = np.nan
    return _predictions(FINDINGS, labels, logits)


def drawn_run(
    draw, splits=("train", "validation", "test"), models=("frozen", "fine_tuned"), temperature=1.7, with_points=True
):
    """metrics.json and predictions (model, then split) of a run."""
    predictions = {
        model: {split: draw(seed, skill=2.0 - (split != "train") + index) for seed, split in enumerate(splits)}
        for index, model in enumerate(models)
    }
    configs = {}
    for model, by_split in predictions.items():
        points = choose_operating_points(by_split["validation"]) if with_points else {}
        labels = dict(enumerate(by_split["validation"].names))
        configs[model] = CXRInceptionConfig(id2label=labels, temperature=temperature, operating_points=points)
    return examine(configs, predictions, resamples=50), predictions


def _predictions(names, labels, logits, groups=None):
    ids = [f"film{film}" for film in range(len(labels))]
    return Predictions(names, labels, logits, ids, [f"patient{film // 2}" for film in range(len(labels))], groups or {})
