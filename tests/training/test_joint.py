"""Joint training: films of another source, their labels and subgroups, learnt beside the run's own."""

import math

import numpy as np
import pytest
import torch
from narrow import PROCESSOR, all_pixel_values, tiny_model
from torch.nn import functional as F
from training.tuning import Tuning, few, forget_after, same

from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import make_features, stack_labels
from cxr_backbone.training import checkpoints
from cxr_backbone.training.arguments import FineTuningArguments, JointArguments
from cxr_backbone.training.batches import to_images, to_pixel_values
from cxr_backbone.training.joint import UNKNOWN, JointModel, JointTargets
from cxr_backbone.training.phases import parameter_groups

WIDTHS = {"label": 2, "subtype": 2, "age": 4, "view": 2}


@pytest.fixture(scope="module")
def others(phantoms):
    """Twelve films with an age, not known of the first, and a view."""
    films = phantoms["train"].select(range(12))
    films = films.add_column("age", [None, *np.linspace(10, 80, 11).tolist()])
    return films.add_column("view", ["AP", "PA"] * 6)


def joint(others, own=None, seed=0, **settings):
    return JointTargets(own, others, JointArguments(**({"batch_size": 5} | settings)), seed=seed)


def own_batch(films, number=2):
    """A batch of the run's own films."""
    rows = [films[row] for row in range(number)]
    return {
        "pixels": torch.from_numpy(stack_pixels(rows)).unsqueeze(1),
        "label": torch.from_numpy(stack_labels(rows)),
        "image_id": [row["image_id"] for row in rows],
    }


def values(targets, head):
    return targets.of_others[head].values


def test_label_and_subgroups_of_the_others_are_learnt_as_far_as_they_are_known(others):
    targets = joint(others)
    assert targets.widths == WIDTHS
    assert values(targets, "label").tolist() == others["label"][:]
    assert values(targets, "age")[0] == UNKNOWN and set(values(targets, "age")[1:].tolist()) == {0, 1, 2, 3}
    assert values(targets, "view").tolist() == [0, 1] * 6


def test_findings_are_learnt_too(phantoms, others):
    findings = make_features(["A", "B"], multi_label=True)
    features = others.features | {"label": findings["label"]}
    rows = [row | {"label": {"A": row["label"], "B": float("nan")}} for row in others]
    targets = joint(type(others).from_list(rows, features=type(others.features)(features)))
    assert targets.widths["label"] == 2 and values(targets, "label")[:, 1].isnan().all()
    loss, beside = losses(JointModel(tiny_model(), targets.widths), targets, phantoms["train"])
    assert loss.isfinite() and beside.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4)


def losses(model, targets, films, number=1):
    batch = own_batch(films)
    pixels, _, known = targets.beside(batch, number)
    return model(to_pixel_values(to_images(pixels), PROCESSOR), batch["label"], known)


def test_each_other_film_is_there_once_in_every_pass_in_an_order_of_its_own(phantoms, others):
    def seen(targets, batches):
        batch = own_batch(phantoms["train"])
        return [image_id for number in batches for image_id in targets.beside(batch, number).image_ids[2:]]

    names = seen(joint(others), range(12))
    passes = [names[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(one) == sorted(others["image_id"][:]) for one in passes)
    assert len({tuple(one) for one in passes}) == 5
    assert seen(joint(others, seed=1), [0]) != seen(joint(others), [0])


def test_other_films_stand_behind_the_runs_own_with_what_is_known_of_them(phantoms, others):
    targets, batch = joint(others), own_batch(phantoms["train"])
    pixels, image_ids, known = targets.beside(batch, 7)
    assert image_ids[:2] == batch["image_id"] and len(image_ids) == 7
    torch.testing.assert_close(pixels[:2], batch["pixels"])
    assert known["age"][:2].tolist() == [UNKNOWN, UNKNOWN]
    rows = [others["image_id"][:].index(image_id) for image_id in image_ids[2:]]
    for place, row in enumerate(rows, start=2):
        assert pixels[place].flatten().numpy().tobytes() == bytes(others[row]["pixels"])
        assert known["age"][place] == values(targets, "age")[row]
    torch.testing.assert_close(targets.beside(batch, 7).pixels, pixels)


def test_subgroups_of_the_runs_own_films_are_learnt_with_others_or_without(phantoms, others):
    own = phantoms["train"].add_column("view", [["AP", "PA", "LL"][n % 3] for n in range(len(phantoms["train"]))])
    alone, both = (joint(films, own, subgroups=["view"]) for films in (None, others))
    assert alone.widths == {"own view": 3} and both.widths == alone.widths | WIDTHS
    batch = own_batch(own)
    assert alone.beside(batch, 0).targets["own view"].tolist() == [0, 2]  # AP, PA of AP, LL, PA
    assert both.beside(batch, 0).targets["own view"].tolist() == [0, 2, *[UNKNOWN] * 5]
    assert both.beside(batch, 0).targets["view"][:2].tolist() == [UNKNOWN] * 2
    torch.testing.assert_close(alone.beside(batch, 0).pixels, batch["pixels"])
    _, beside = losses(JointModel(tiny_model(), alone.widths), alone, own)
    assert beside.item() == pytest.approx(math.log(3), rel=1e-4)


def test_subgroups_that_there_are_none_of_are_refused(phantoms):
    with pytest.raises(ValueError, match=r"joint\.subgroups=\['hospital'\] is not allowed: hospital divides"):
        joint(None, phantoms["train"], subgroups=["hospital"])


def test_films_of_which_nothing_differs_teach_nothing(others):
    alike = others.remove_columns(["age", "view"]).filter(lambda row: row["label"] == 0)
    features = make_features(["NORMAL"])
    alike = alike.cast_column("label", features["label"])
    with pytest.raises(ValueError, match=r"joint\.films: every film has the same label"):
        joint(alike, batch_size=2)


def test_a_batch_of_more_films_than_there_are_is_refused(others):
    with pytest.raises(ValueError, match=r"joint\.batch_size=13 is more than the 12 films"):
        joint(others, batch_size=13)


def test_the_losses_are_those_of_the_classifier_and_of_each_head(phantoms, others):
    targets, model = joint(others), tiny_model()
    both = JointModel(model, targets.widths).eval()
    torch.nn.init.normal_(both.heads[3].weight)
    loss, beside = losses(both, targets, phantoms["train"])
    pixels, _, known = targets.beside(own_batch(phantoms["train"]), 1)
    pixel_values = to_pixel_values(to_images(pixels), PROCESSOR)
    with torch.no_grad():
        labels = own_batch(phantoms["train"])["label"]
        torch.testing.assert_close(loss, model(pixel_values[:2], labels=labels).loss)
        view = both.heads[3](model.cxr_inception(pixel_values[2:]).pooler_output)
        of_view = F.cross_entropy(view, known["view"][2:])
    assert beside.item() == pytest.approx((2 * math.log(2) + math.log(4) + of_view.item()) / 4, rel=1e-4)


def test_what_is_known_of_no_film_of_a_batch_costs_nothing(others):
    both = JointModel(tiny_model(), {"age": 4})
    _, beside = both(all_pixel_values(others)[:6], torch.tensor([0, 1]), {"age": torch.full((6,), UNKNOWN)})
    assert beside.item() == 0


def test_the_heads_are_trained_at_the_rate_of_the_classifier():
    both = JointModel(tiny_model(), {"view": 2})
    groups = parameter_groups(both, FineTuningArguments(learning_rate=0.1, stage_decay=0.5))
    trained = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in both.parameters()}
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates[id(both.heads[0].weight)] == rates[id(both.model.classifier.output_layer.weight)] == 0.1


def test_what_is_known_of_the_other_films_is_learnt(phantoms, tmp_path):
    """Some of them are dark."""

    def mark(row, number):
        is_dark = number % 2 == 1
        pixels = np.frombuffer(bytes(row["pixels"]), np.uint8)
        return {"pixels": (pixels // 8 if is_dark else pixels).tobytes(), "kind": "AB"[is_dark]}

    marked = phantoms["train"].select(range(12)).map(mark, with_indices=True)
    settings = {"epochs": 16, "learning_rate": 5e-3, "stage_decay": 1.0, "ema_decay": 0.0, "augmentation": 0.0}
    run = Tuning(tmp_path, few(phantoms), joint=joint(marked, weight=5.0), save_minutes=100, **settings).train()
    both = JointModel(tiny_model(dropout=0.3), {"label": 2, "subtype": 2, "kind": 2})
    both.load_state_dict(run.state(run.saved[-1])["model"])
    with torch.no_grad():
        features = both.eval().model.cxr_inception(all_pixel_values(marked)).pooler_output
        told = both.heads[2](features).argmax(dim=1)
    assert told.tolist() == [0, 1] * 6


def test_what_is_kept_is_the_classifier_alone_and_its_losses_are_logged(phantoms, others, tmp_path):
    run = Tuning(tmp_path, few(phantoms), joint=joint(others)).train()
    kept = tiny_model(dropout=0.3).from_pretrained(run.run.fine_tuned)
    assert set(kept.state_dict()) == set(tiny_model().state_dict())
    first = next(line for line in run.log if "step" in line)["train_loss"]
    assert first == pytest.approx(math.log(2), abs=0.3)  # without those of the joint films


def test_a_joint_training_that_is_taken_up_ends_where_one_ends_that_was_never_stopped(
    phantoms, others, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "KEPT", 1000)
    films, beside = few(phantoms), joint(others)
    whole = Tuning(tmp_path / "whole", films, joint=beside).train()
    for steps in (1, 6):
        folder = forget_after(whole, steps, tmp_path / str(steps))
        again = Tuning(folder, films, joint=joint(others)).train()
        assert again.saved[-1] == whole.saved[-1]
        assert same(again.state(again.saved[-1]), whole.state(whole.saved[-1]))
