"""Phase one's single pass: the frozen backbone turns every image into its pooled features, once."""

import hashlib
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionModel
from cxr_backbone.training.atomic import replacing
from cxr_backbone.training.batches import run_through


def extract_features(
    backbone: CXRInceptionModel,
    films: Dataset | FilmStream,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    cache_dir: Path,
) -> tuple[Tensor, Tensor]:
    """Pooled features (len(films), 2048), float32 on the CPU, and the labels beside them, in the order of
    `batches.run_through`.

    They are kept in `cache_dir` under a fingerprint of weights, processor, precision and data; a later call with the
    same four reads them back.
    """
    path = cache_dir / f"features-{_fingerprint(backbone, image_processor, accelerator, films)}.safetensors"
    # The main process looks for all: were they to see different things, they would wait for each other.
    has_it = accelerator.is_main_process and path.is_file()
    (stored,) = broadcast_object_list([load_file(path) if has_it else None])
    if stored is not None:
        return stored["features"], stored["labels"]

    backbone.eval()
    features, labels = run_through(
        lambda pixel_values: backbone(pixel_values).pooler_output,
        films,
        image_processor,
        accelerator,
        batch_size=batch_size,
        desc="features",
    )
    if accelerator.is_main_process:
        with replacing(path) as file:
            save_file({"features": features, "labels": labels}, file)
    accelerator.wait_for_everyone()
    return features, labels


def _fingerprint(
    backbone: CXRInceptionModel,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    films: Dataset | FilmStream,
) -> str:
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for text in (
        backbone.config.to_json_string(),
        image_processor.to_json_string(),
        accelerator.mixed_precision,
        films.fingerprint if isinstance(films, FilmStream) else films._fingerprint,
    ):
        digest.update(text.encode())
    return digest.hexdigest()[:32]
