"""A chest X-ray backbone (Inception V3) for Hugging Face Transformers.

Importing this package registers its classes, so that `AutoModel`, `AutoModelForImageClassification`, `AutoBackbone`,
`AutoImageProcessor` and `pipeline` open a CXRInception checkpoint without remote code.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from .configuration_cxr_inception import CXRInceptionConfig
from .image_processing_cxr_inception import CXRInceptionImageProcessor
from .modeling_cxr_inception import (
    CXRInceptionBackbone,
    CXRInceptionForImageClassification,
    CXRInceptionModel,
)

__version__ = "0.1.0"

AutoConfig.register(CXRInceptionConfig.model_type, CXRInceptionConfig)
AutoModel.register(CXRInceptionConfig, CXRInceptionModel)
AutoModelForImageClassification.register(CXRInceptionConfig, CXRInceptionForImageClassification)
AutoBackbone.register(CXRInceptionConfig, CXRInceptionBackbone)
AutoImageProcessor.register(CXRInceptionConfig, slow_image_processor_class=CXRInceptionImageProcessor)

__all__ = [
    "CXRInceptionBackbone",
    "CXRInceptionConfig",
    "CXRInceptionForImageClassification",
    "CXRInceptionImageProcessor",
    "CXRInceptionModel",
]
