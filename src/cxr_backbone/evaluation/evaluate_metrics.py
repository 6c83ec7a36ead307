"""The figures of `metrics` as metrics of the evaluate library; they need no network and can be combined.

    metrics = evaluate.combine([ClassificationMetrics(), CalibrationMetrics()])
    metrics.compute(predictions=scores, references=labels)

They have a module of their own, and no recipe imports it: where a script in recipes/ runs, `import evaluate` would find
recipes/evaluate.py.
"""

import datasets
import evaluate

from cxr_backbone.evaluation.metrics import Figures, calibration_summary, classification_figures


class ClassificationMetrics(evaluate.Metric):
    """`metrics.classification_figures` of predictions (scores) and references (labels)."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return _info_of(self)

    def _build_data_dir(self) -> str:
        return ""  # evaluate would make a folder in its cache, for files that a metric in memory never writes

    def _compute(self, predictions, references) -> Figures:
        return classification_figures(references, predictions)


class CalibrationMetrics(ClassificationMetrics):
    """`metrics.calibration_summary` of predictions (scores) and references (labels)."""

    def _compute(self, predictions, references) -> Figures:
        return calibration_summary(references, predictions)


def _info_of(metric: evaluate.Metric) -> evaluate.MetricInfo:
    scores = datasets.List(datasets.Value("float64"))
    # Class indices are float64 as well: int64 would cut a label of 0.9 down to 0 without a word.
    references = (datasets.List(datasets.Value("float64")), datasets.Value("float64"))
    return evaluate.MetricInfo(
        description=metric.__doc__,
        citation="",
        inputs_description=__doc__,
        features=[datasets.Features(predictions=scores, references=labels) for labels in references],
    )
