"""Exported to ONNX, the model answers the same on onnxruntime and OpenVINO, for images of any number and size."""

import socket

import numpy as np
import openvino
import pytest
import torch
from narrow import PROCESSOR, tiny_model
from test_fuse import in_use
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter


@pytest.fixture(scope="module")
def model():
    return in_use(tiny_model(3))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    sample = {"pixel_values": torch.rand(2, 1, 75, 75)}
    OnnxExporter().export(model, sample, OnnxConfig(dynamic=True)).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(params=[(1, 75, 75), (5, 96, 120)], ids=str)
def images(request):
    batch, height, width = request.param
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(0))


def test_on_onnxruntime(model, exported, images):
    outputs = ExportedModel.from_pretrained(exported, device="cpu")(pixel_values=images)
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, model(images).logits, rtol=1e-4, atol=1e-5)


def test_on_openvino_without_a_request(model, exported, images, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    engine = openvino.Core().compile_model(exported / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model(images).logits.numpy()
    np.testing.assert_allclose(engine(images.numpy())["logits"], expected, rtol=1e-4, atol=1e-5)


def test_the_export_says_what_its_answers_mean(model, exported):
    assert ExportedModel.from_pretrained(exported, device="cpu").config.id2label == model.config.id2label
