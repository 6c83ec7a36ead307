"""Where a model finds what it says: Grad-CAM. Needs captum: pip install 'cxr-backbone[report]'."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor

from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification


@dataclass(frozen=True)
class SalientFilm:
    """A film and what speaks for one answer in it.

    kind: "surest right", "surest wrong" or "least sure".
    target: what was asked.
    image_id: what the film is called.
    truth, called: the answer that is true, and the model's.
    score: probability of `target`.
    explained: the label that `map` speaks for.
    pixels: uint8 (size, size), the film as the model gets it, before normalisation.
    map: float32 (size, size) in [0, 1].
    """

    kind: str
    target: str
    image_id: str
    truth: str
    called: str
    score: float
    explained: str
    pixels: np.ndarray
    map: np.ndarray


def grad_cam(model: CXRInceptionForImageClassification, pixel_values: Tensor, targets: list[int]) -> np.ndarray:
    """What speaks for a label, and where (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks").

    The feature maps of the last stage, weighted by how much each raises the logit; what lowers it is left out. The last
    stage sees a film in cells of about 32 pixels, so a map points to a region and never to an edge. The model is left
    as it was: mode, gradients and what is frozen.

    Args:
        pixel_values: (batch, channels, height, width), normalised by the image processor.
        targets: index of the logit to explain, one a film.

    Returns:
        float32 (batch, height, width) in [0, 1], each map divided by its maximum. All zero if nothing speaks for the
        label.

    Raises:
        ValueError: not one target a film, or a target that is no label of the model.
    """
    labels = model.classifier.output_layer.out_features
    if len(targets) != len(pixel_values) or not set(targets) <= set(range(labels)):
        raise ValueError(f"targets is {targets}; expected {len(pixel_values)}, one a film, from 0 to {labels - 1}.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        explainer = LayerGradCam(lambda images: model(images).logits, model.cxr_inception.encoder.stages["stage4"])
        coarse = explainer.attribute(pixel_values.to(model.device), targets, relu_attributions=True)
    finally:
        for module, training in modes:
            module.training = training
    maps = LayerAttribution.interpolate(coarse.detach().float(), tuple(pixel_values.shape[-2:]), "bilinear")
    strongest = maps.amax(dim=(2, 3), keepdim=True)  # (batch, 1, 1, 1)
    return (maps / strongest.where(strongest > 0, 1))[:, 0].cpu().numpy()


def choose_films(
    predictions: Predictions, target: str, *, threshold: float = 0.5, number: int = 4
) -> dict[str, list[int]]:
    """The films that say most about a model: indices for each kind, at most `number` each.

    Among the surest, those called positive (score >= threshold) and those called negative take turns, as far as there
    are both. The least sure lie nearest to the threshold. No film is there twice.

    Returns:
        `surest right`, `surest wrong` and `least sure`.
    """
    films, truth, scores = predictions.question(target)
    right = (scores >= threshold) == truth
    chosen = {
        "surest right": _surest(films[right], scores[right], threshold, number),
        "surest wrong": _surest(films[~right], scores[~right], threshold, number),
    }
    nearest = films[np.abs(scores - threshold).argsort(kind="stable")].tolist()
    shown = set(chain(*chosen.values()))
    return chosen | {"least sure": [film for film in nearest if film not in shown][:number]}


def salient_films(
    model: CXRInceptionForImageClassification,
    predictions: Predictions,
    target: str,
    chosen: dict[str, list[int]],
    pixels: np.ndarray,
    pixel_values: Tensor,
    *,
    threshold: float = 0.5,
) -> list[SalientFilm]:
    """The chosen films, each with the map of what speaks for the answer that the model gave.

    A film without a finding, or one of the rest, has no logit of its own: there the map shows what speaks for `target`
    all the same. Of two classes each has one.

    Args:
        predictions, target, chosen, threshold: as given to and returned by `choose_films`.
        pixels: uint8 (films, size, size), the chosen films in the order of `chosen`.
        pixel_values: (films, channels, size, size), the same films normalised by the image processor.
    """
    names, index = predictions.names, predictions.names.index(target)
    two_classes = len(names) == 2 and not predictions.is_multi_label
    other = names[1 - index] if two_classes else f"no {target}"
    places = [(kind, film) for kind, films in chosen.items() for film in films]
    known, truth, scores = predictions.question(target)
    answers = {film: (bool(is_there), float(score)) for film, is_there, score in zip(known, truth, scores, strict=True)}
    explained = [1 - index if two_classes and answers[film][1] < threshold else index for _, film in places]
    maps = grad_cam(model, pixel_values, explained)
    return [
        SalientFilm(
            kind=kind,
            target=target,
            image_id=predictions.image_ids[film],
            truth=target if answers[film][0] else other,
            called=target if answers[film][1] >= threshold else other,
            score=answers[film][1],
            explained=names[explained[place]],
            pixels=pixels[place],
            map=maps[place],
        )
        for place, (kind, film) in enumerate(places)
    ]


def _surest(films: np.ndarray, scores: np.ndarray, threshold: float, number: int) -> list[int]:
    order = scores.argsort(kind="stable")
    negative = films[order[scores[order] < threshold]].tolist()
    positive = films[order[scores[order] >= threshold]][::-1].tolist()
    turns = chain(*zip_longest(positive, negative))
    return [film for film in turns if film is not None][:number]
