"""Phase one's single pass: the frozen backbone turns every image into its pooled features, once."""

import hashlib
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionModel
from cxr_backbone.training.batches import make_loader, run_through


def extract_features(
    backbone: CXRInceptionModel,
    dataset: Dataset,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    cache_dir: Path,
) -> Tensor:
    """Pooled features (len(dataset), 2048), float32 on the CPU, in the order of `dataset`.

    They are kept in `cache_dir` under a fingerprint of weights, processor, precision and data; a later call with the
    same four reads them back.
    """
    path = cache_dir / f"features-{_fingerprint(backbone, image_processor, accelerator, dataset)}.safetensors"
    if path.is_file():
        return load_file(path)["features"]

    backbone.eval()
    loader = make_loader(dataset, batch_size, accelerator)
    features = run_through(
        lambda pixel_values: backbone(pixel_values).pooler_output, loader, image_processor, accelerator, desc="features"
    )
    if accelerator.is_main_process:
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file({"features": features}, unfinished)
        unfinished.replace(path)
    accelerator.wait_for_everyone()
    return features


def _fingerprint(
    backbone: CXRInceptionModel,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    dataset: Dataset,
) -> str:
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for text in (
        backbone.config.to_json_string(),
        image_processor.to_json_string(),
        accelerator.mixed_precision,
        dataset._fingerprint,
    ):
        digest.update(text.encode())
    return digest.hexdigest()[:32]
