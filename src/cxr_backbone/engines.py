"""The model on onnxruntime and on OpenVINO: engines that are made for CPUs, and twice as fast as torch and more.

Both would keep or send statistics of their use: onnxruntime to Microsoft, OpenVINO to Google whenever it is imported.
Through this module neither does. Needs the extra `onnx`, and `openvino` for the second.
"""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification

# They look when they are imported, so this has to stand before. Without its telemetry package OpenVINO sends nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

MODEL = "model.onnx"
# Pixel values (batch, num_channels, height, width), float32, normalised by the image processor, to logits (batch,
# num_labels), float32. Batch, height and width may differ from call to call.
Engine = Callable[[Tensor], Tensor]


def export_to_onnx(
    model: CXRInceptionForImageClassification, image_processor: CXRInceptionImageProcessor, folder: str | Path
) -> None:
    """Write `model.onnx` (float32, by Transformers' exporter), its configuration and the image processor to `folder`.

    Raises:
        ValueError: the model is a copy that `fuse()` made; engines fold by themselves.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    if model.is_fused:
        raise ValueError("This copy was made by fuse(); export the original.")
    size = model.config.image_size
    sample: dict = {"pixel_values": torch.rand(2, model.config.num_channels, size, size)}
    plain = copy.deepcopy(model).float().cpu().eval()
    OnnxExporter().export(plain, sample, OnnxConfig(dynamic=True)).save_pretrained(folder)
    image_processor.save_pretrained(folder)


def on_onnxruntime(folder: str | Path, threads: int | None = None) -> Engine:
    """An exported model on onnxruntime.

    Args:
        threads: of the CPU (default: all cores).

    Raises:
        FileNotFoundError: the folder has no `model.onnx`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(_model_in(folder), options, providers=["CPUExecutionProvider"])

    def answer(pixel_values: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        return torch.from_numpy(logits)

    return answer


def on_openvino(folder: str | Path, *, dtype: torch.dtype = torch.float32, threads: int | None = None) -> Engine:
    """An exported model on OpenVINO.

    Args:
        dtype: that it computes in, float32 or bfloat16. (Not told, OpenVINO takes bfloat16 wherever the CPU has it, and
            scores move by it.)
        threads: of the CPU (default: all cores).

    Raises:
        FileNotFoundError: the folder has no `model.onnx`.
        KeyError: for another dtype.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    engine = openvino.Core().compile_model(_model_in(folder), "CPU", settings)
    return lambda pixel_values: torch.from_numpy(engine(pixel_values.numpy())["logits"].copy())


def _model_in(folder: str | Path) -> str:
    path = Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; expected a folder that export_to_onnx has written.")
    return str(path)
