"""What the page shows of one film: the guard's verdict, the film with what spoke for the answer, scores, decisions."""

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from cxr_backbone import CXRInceptionConfig

LIKE = "This looks like the films that the model was trained on."
UNLIKE = "This does not look like a frontal chest X-ray I know."
CSS = """
:root { --overlay: 0.5 }
.film { border-top: 1px solid var(--border-color-primary); padding: 1em 0 }
.film h3, .film p { overflow-wrap: anywhere }
.film .pictures { position: relative; width: min(100%, 450px) }
.film .pictures img { width: 100%; display: block }
.film .pictures img + img { position: absolute; inset: 0; opacity: var(--overlay) }
.film .like, .film .unlike, .film .refused { padding: 0.5em 0.8em; border-left: 6px solid; font-weight: 600 }
.film .like { border-color: #2a7a3b }
.film .unlike, .film .refused { border-color: #b3261e }
.film .wide { overflow-x: auto }
.film td, .film th { padding: 0.2em 0.8em; text-align: left }
.film .points { white-space: nowrap }
"""


@dataclass(frozen=True)
class Answer:
    """What the model says of a film.

    scores: of the pipeline: label, score and out_of_distribution, the highest score first.
    config: of the model, with its operating points.
    seen: uint8 (size, size), the film as the model sees it.
    explained: the label whose places are shown; None where no place speaks for any.
    places: float32 (size, size) in [0, 1], where the film speaks for it.
    """

    scores: list[dict[str, Any]]
    config: CXRInceptionConfig
    seen: np.ndarray
    explained: str | None
    places: np.ndarray | None

    @property
    def is_outside(self) -> bool:
        return self.scores[0]["out_of_distribution"]

    def as_json(self) -> dict[str, Any]:
        """`out_of_distribution`, `scores`, and `decisions`, which has the answer at each operating point."""
        scores = {score["label"]: score["score"] for score in self.scores}
        return {"out_of_distribution": self.is_outside, "scores": scores, "decisions": self._decisions}

    @property
    def _decisions(self) -> dict[str, dict[str, bool]]:
        """For each label that has operating points, what the model decides at each."""
        points = self.config.operating_points or {}
        return {
            label: {name: self.config.decide(self.scores, name)[label] for name in points[label]} for label in points
        }

    def as_html(self, name: str) -> str:
        verdict = f'<p class="unlike">{UNLIKE}</p>' if self.is_outside else f'<p class="like">{LIKE}</p>'
        says = self._scores_as_html()
        if self.is_outside:
            says = f"<details><summary>Its scores all the same, which mean nothing</summary>{says}</details>"
        return f'<section class="film"><h3>{html.escape(name)}</h3>{verdict}{self._pictures_as_html()}{says}</section>'

    def _pictures_as_html(self) -> str:
        film = f'<img src="{_data_uri(self.seen)}" alt="the film as the model sees it">'
        if self.places is None:
            return f'<div class="pictures">{film}</div><p>No place in the film speaks for an answer by itself.</p>'
        heat = matplotlib.colormaps["inferno"](self.places, bytes=True)  # (size, size, 4)
        heat[..., 3] = np.rint(255 * self.places)
        overlay = f'<img src="{_data_uri(heat)}" alt="what speaks for {html.escape(str(self.explained))}">'
        answer = self.scores[0]["label"]
        instead = "" if self.explained == answer else f" (no place speaks for {html.escape(answer)} by itself)"
        caption = (
            f"Bright: what speaks for {html.escape(str(self.explained))}{instead}. Regions, never edges (Grad-CAM)."
        )
        return f'<div class="pictures">{film}{overlay}</div><p>{caption}</p>'

    def _scores_as_html(self) -> str:
        rows = [f"<tr><td>{html.escape(score['label'])}<td>{score['score']:.3f}" for score in self.scores]
        scores = f'<table class="scores"><tr><th>label<th>calibrated probability{"".join(rows)}</table>'
        decisions = []
        for label, its in self._decisions.items():
            for name, reached in its.items():
                point = (self.config.operating_points or {})[label][name]
                decisions.append(
                    f"<tr><td>{html.escape(name)}<td>{point['threshold']:.3f}"
                    f"<td>{html.escape(label if reached else f'not {label}')}"
                    f"<td>{point['sensitivity']:.3f}<td>{point['specificity']:.3f}<td>{point['films']:.0f}"
                )
        if not decisions:
            return scores
        header = "<tr><th>operating point<th>from<th>says<th>validation sensitivity<th>specificity<th>films"
        return f'{scores}<div class="wide"><table class="points">{header}{"".join(decisions)}</table></div>'


def refused_as_html(name: str, why: str) -> str:
    return f'<section class="film"><h3>{html.escape(name)}</h3><p class="refused">{html.escape(why)}</p></section>'


def _data_uri(pixels: np.ndarray) -> str:
    """A picture inside the page, so that none has to lie on the server's disk."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
