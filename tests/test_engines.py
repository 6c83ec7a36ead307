"""On onnxruntime and OpenVINO the model answers the same, for images of any number and size, and nobody is told."""

import os
import subprocess
import sys

import pytest
import torch
from narrow import PROCESSOR, in_use, tiny_model
from transformers import AutoConfig, AutoImageProcessor

from cxr_backbone.engines import export_to_onnx, on_onnxruntime, on_openvino


@pytest.fixture(scope="module")
def model():
    return in_use(tiny_model(3))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_to_onnx(model.train(), PROCESSOR, folder)
    assert model.training
    model.eval()
    return folder


@pytest.mark.parametrize("engine", [on_onnxruntime, on_openvino])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 75, 75), (5, 96, 120)])
def test_an_engine_answers_the_same(model, exported, engine, batch, height, width):
    images = torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).logits
    for threads in (None, 1):
        torch.testing.assert_close(engine(exported, threads=threads)(images), expected, rtol=1e-4, atol=1e-5)


def test_openvino_computes_in_bfloat16_only_when_told(model, exported):
    images = torch.rand(4, 1, 75, 75, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).logits
    torch.testing.assert_close(on_openvino(exported, dtype=torch.bfloat16)(images), expected, rtol=0.1, atol=0.1)
    with pytest.raises(KeyError, match=r"torch\.float64"):
        on_openvino(exported, dtype=torch.float64)


def test_half_precision_is_exported_in_full(model, exported, tmp_path):
    export_to_onnx(tiny_model(3).bfloat16(), PROCESSOR, tmp_path)
    assert on_onnxruntime(tmp_path)(torch.rand(1, 1, 75, 75)).dtype == torch.float32


def test_the_folder_says_what_goes_in_and_what_comes_out(model, exported):
    assert AutoConfig.from_pretrained(exported).id2label == model.config.id2label
    assert AutoImageProcessor.from_pretrained(exported).to_dict() == PROCESSOR.to_dict()


def test_a_fused_copy_and_a_folder_without_a_model_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="export the original"):
        export_to_onnx(model.fuse(), PROCESSOR, tmp_path)
    for engine in (on_onnxruntime, on_openvino):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "model.onnx")):
            engine(tmp_path)


ASK_BOTH = """
import socket, sys
def refuse(*given, **named): print("a request:", *given)
socket.getaddrinfo = socket.socket.connect = refuse
import torch
from cxr_backbone.engines import on_onnxruntime, on_openvino
for engine in (on_onnxruntime, on_openvino):
    engine(sys.argv[1])(torch.rand(1, 1, 75, 75))
"""


def test_nothing_is_kept_or_sent(exported, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    process = subprocess.run(
        [sys.executable, "-c", ASK_BOTH, exported],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "" and not [path for path in tmp_path.rglob("*") if path.is_file()]
