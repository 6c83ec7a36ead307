"""The guard tells pictures that are unlike the training films, and the pipeline says so with every answer."""

import numpy as np
import pytest
import torch
from narrow import PROCESSOR, in_use, tiny_model
from PIL import Image
from transformers import pipeline

from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.guard import FILE, SHARE_OUTSIDE, Guard, guarded_pipeline, pooled_stages

FEATURES = 40


def drawn(number, seed, shift=0.0):
    """Features that lie near a plane, most of them."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))
    at = torch.randn(number, 2, generator=generator)
    return 5 + 3 * at @ plane + 0.1 * torch.randn(number, FEATURES, generator=generator) + shift


@pytest.fixture(scope="module")
def guard():
    return Guard.fit(drawn(300, seed=1), drawn(1000, seed=2))


def test_training_films_are_at_a_distance_of_about_one(guard):
    assert guard.distance(drawn(300, seed=1)).square().mean().item() == pytest.approx(1, abs=0.1)


def test_one_in_a_hundred_validation_films_is_outside(guard):
    assert guard.is_outside(drawn(1000, seed=2)).float().mean().item() == pytest.approx(SHARE_OUTSIDE, abs=0.002)


def test_what_lies_off_the_plane_is_outside_however_near_the_mean(guard):
    assert guard.is_outside(drawn(50, seed=3, shift=torch.linspace(-1, 1, FEATURES))).all()
    assert not guard.is_outside(drawn(300, seed=1).mean(dim=0, keepdim=True)).any()


def test_what_is_no_number_is_outside(guard):
    assert guard.is_outside(torch.full((1, FEATURES), float("nan"))).all()


def test_it_comes_back_as_it_was_saved(guard, tmp_path):
    guard.save(tmp_path)
    again = Guard.from_pretrained(tmp_path)
    torch.testing.assert_close(again.distance(drawn(5, seed=4)), guard.distance(drawn(5, seed=4)))
    assert again.threshold == guard.threshold


def test_a_model_without_one_is_refused_and_so_is_a_damaged_file(tmp_path):
    with pytest.raises(ValueError, match=f"has no {FILE}"):
        Guard.from_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no guard"):
        Guard.from_pretrained(tmp_path)


def test_a_hub_that_is_not_there_is_not_taken_for_a_model_without_a_guard(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="cannot find the requested files"):
        Guard.from_pretrained("org/cxr-inception")


def test_too_few_films_are_refused():
    with pytest.raises(ValueError, match="2 training and 5 validation films"):
        Guard.fit(drawn(2, seed=0), drawn(5, seed=1))


def features_of(model, phantoms):
    drawn = [draw_phantom(number, opacity=number % 2 == 1, image_size=75) for number in phantoms]
    with torch.no_grad():
        said = model(**PROCESSOR(drawn, return_tensors="pt"), output_hidden_states=True)
    return pooled_stages(said.hidden_states)


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """A pipeline with the guard of a network that knows phantoms."""
    folder, model = tmp_path_factory.mktemp("guarded"), in_use(tiny_model())
    Guard.fit(features_of(model, range(60)), features_of(model, range(60, 100))).save(folder)
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return guarded_pipeline(folder)


def pictures():
    phantom = Image.fromarray(draw_phantom(1000, opacity=False, image_size=75))
    board = Image.fromarray(np.kron(np.indices((15, 15)).sum(axis=0) % 2, np.full((5, 5), 255)).astype(np.uint8))
    return [phantom, board, Image.new("L", (80, 80), 255)]


def test_the_pipeline_knows_a_phantom_from_a_chessboard_and_from_a_blank(classify, caplog):
    said = [{answer["out_of_distribution"] for answer in classify(picture)} for picture in pictures()]
    assert said == [{False}, {True}, {True}]
    assert caplog.text.count("unlike the films that the model was trained on") == 2


def test_in_batches_the_answers_are_the_same(classify):
    alone, together = [classify(picture) for picture in pictures()], classify(pictures(), batch_size=2)
    for one, other in zip(alone, together, strict=True):
        assert [answer["out_of_distribution"] for answer in one] == [answer["out_of_distribution"] for answer in other]
        assert [answer["score"] for answer in one] == pytest.approx([answer["score"] for answer in other], abs=1e-5)


def test_the_scores_are_those_of_the_plain_pipeline(classify):
    plain = pipeline("image-classification", model=classify.model, image_processor=PROCESSOR)
    for picture in pictures():
        guarded = [{key: answer[key] for key in ("label", "score")} for answer in classify(picture)]
        assert guarded == plain(picture)
