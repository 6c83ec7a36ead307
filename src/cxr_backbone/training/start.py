"""The model that a run starts from."""

from typing import Any

from cxr_backbone.configuration_cxr_inception import CXRInceptionConfig
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import ModelArguments
from cxr_backbone.weights import load_inception_v3


def start_model(
    arguments: ModelArguments, label_names: list[str], *, multi_label: bool = False
) -> tuple[CXRInceptionForImageClassification, CXRInceptionImageProcessor]:
    """A classifier with a new head on the backbone that `arguments.init` names, or on random weights if it names none.

    Args:
        label_names: classes, of which an image has one; or with `multi_label` findings, each there or not.

    Raises:
        FileNotFoundError, ValueError: as `load_inception_v3`.
    """
    settings: dict[str, Any] = {
        "image_size": arguments.image_size,
        "num_channels": arguments.num_channels,
        "dropout": arguments.dropout,
        "head_hidden_sizes": arguments.head_hidden_sizes,
        "label_smoothing": arguments.label_smoothing,
        "id2label": dict(enumerate(label_names)),
        "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
    }
    for name in ("depth_multiplier", "avg_pool_count_include_pad"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)

    if arguments.init is None:
        image_processor = CXRInceptionImageProcessor(
            size={"height": arguments.image_size, "width": arguments.image_size},
            num_channels=arguments.num_channels,
            image_mean=[0.5] * arguments.num_channels,
            image_std=[0.5] * arguments.num_channels,
        )
        return CXRInceptionForImageClassification(CXRInceptionConfig(**settings)), image_processor

    backbone, image_processor = load_inception_v3(
        arguments.init, image_mean=arguments.image_mean, image_std=arguments.image_std, **settings
    )
    model = CXRInceptionForImageClassification(backbone.config)
    model.cxr_inception = backbone
    return model, image_processor
