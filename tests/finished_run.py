"""The files of a finished run, without a training: figures of drawn predictions, an audit of drawn films."""

import functools
import json
from dataclasses import asdict

import datasets
import yaml
from data.drawn_sets import decoded, phantoms
from evaluation.drawn_predictions import drawn_run, two_classes
from huggingface_hub import ModelCard
from running import ROOT

from cxr_backbone import CXRInceptionConfig
from cxr_backbone.card import write_card
from cxr_backbone.data.audit import audit
from cxr_backbone.training.arguments import parse_arguments

TEMPLATE = ROOT / "model_card.md"
REPO = "org/cxr-inception"
INSIDE = ("train", "validation", "test")


class FinishedRun:
    """The files of a run that a card is made of, and the folder that it goes into."""

    def __init__(self, folder):
        self.path, self.hub = folder / "run", folder / "run/hub"
        self.hub.mkdir(parents=True)
        self.audit_report = json.loads(audited())

    def finish(self, *options, draw=two_classes, splits=INSIDE, config="pneumonia", sha256=None, **drawing):
        words = [str(ROOT / f"recipes/configs/{config}.yaml"), *options]
        metrics, said = drawn(draw, splits=splits, **drawing)
        for seconds, model in enumerate(metrics["models"].values()):
            model["seconds"] = 1234.5 + seconds
        self.write("metrics.json", metrics)
        self.write("audit.json", self.audit_report)
        if any(split.startswith("external ") for split in splits):
            (self.path / "external.yaml").write_text("data: {format: table, provenance: A clinic's films; CC0}")
        if "--joint.films" in options:
            (self.path / "joint.yaml").write_text("data: {format: table, provenance: Adults of a clinic; CC0}")
            (self.path / "joint.csv").write_text("split,image_id,patient_id\njoint,1.png,7\njoint,2.png,8\n")
        settings = asdict(parse_arguments([*words, "--run.output_dir", "runs/this"]))
        (self.path / "config.yaml").write_text(yaml.safe_dump(settings))
        environment = {
            "command": ["two_stage.py", f"recipes/configs/{config}.yaml", *options],
            "python": "3.11.7",
            "packages": {"cxr-backbone": "0.1.0", "torch": "2.13.0"},
            "initial_weights_sha256": sha256,
            "device": "NVIDIA Test",
            "threads": 3,
            "processes": 2,
            "mixed_precision": "bf16",
        }
        self.write("environment.json", environment)
        CXRInceptionConfig(
            id2label=dict(enumerate(said.names)),
            problem_type="multi_label_classification" if said.is_multi_label else "single_label_classification",
        ).save_pretrained(self.hub)
        return self

    def draw(self, *pictures):
        (self.hub / "figures").mkdir()
        for name in pictures:
            (self.hub / "figures" / name).write_bytes(b"a picture")
        return self

    def read(self, name):
        return json.loads((self.path / name).read_text())

    def write(self, name, content):
        (self.path / name).write_text(json.dumps(content))

    def card(self):
        write_card(self.path, self.hub, TEMPLATE, REPO)
        return (self.hub / "README.md").read_text()

    def metadata(self):
        self.card()
        return ModelCard.load(self.hub / "README.md").data


@functools.cache
def drawn_text(draw, **options):
    if options.get("temperature") == "one each":
        options["temperature"] = [1.5, *[1.25] * 13]
    metrics, predictions = drawn_run(draw, **options)
    return json.dumps(metrics), predictions["fine_tuned"]["test"]


def drawn(draw, **options):
    """Metrics, and what the model said of the test split; drawn once for all tests."""
    metrics, said = drawn_text(draw, **options)
    return json.loads(metrics), said


@functools.cache
def audited():
    films = phantoms(0, 60)
    train = decoded(films[:48], patients=[f"patient{row // 2}" for row in range(48)])
    validation = decoded(films[46:54], patients=[f"patient{row}" for row in range(20, 28)])
    return json.dumps(audit(datasets.DatasetDict(train=train, validation=validation, test=decoded(films[54:]))))
