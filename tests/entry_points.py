"""The README's three entry points, for the Python that runs this file and the package that is installed there:

    python tests/entry_points.py FOLDER

trains a tiny model in FOLDER, opens it and classifies a film with it, each in a process of its own, and prints what the
last two said as one line of JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {
    "data.num_patients": 40,
    "model.image_size": 75,
    "model.depth_multiplier": 0.1,
    "fine_tuning.epochs": 1,
    "fine_tuning.batch_size": 8,
    "evaluation.report": "false",  # its pictures need an extra
    "run.mixed_precision": "no",
    "run.cpu_threads": 1,
    "run.output_dir": "run",
}
REUSE = """
import json, sys
import cxr_backbone
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
print(json.dumps({"package": cxr_backbone.__file__, "module": type(model).__module__}))
"""
INFER = """
import json, sys
import numpy as np
from PIL import Image
from transformers import pipeline

Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)).save("chest.png")
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps({"module": type(classify.model).__module__, "answer": classify("chest.png")}))
"""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_cpu_threads_per_process", "1"]
    run_python(folder, *launch, RECIPES / "two_stage.py", RECIPES / "configs/sample.yaml", *options)
    model = "run/fine_tuned"
    answers = {"reuse": run_python(folder, "-c", REUSE, model), "infer": run_python(folder, "-c", INFER, model)}
    print(json.dumps({name: json.loads(output.splitlines()[-1]) for name, output in answers.items()}))


def run_python(folder: Path, *argv: str | Path) -> str:
    """What the process prints; where it fails, this one ends with what it said last."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, argv[:3]))}: {process.stderr[-3000:]}")
    return process.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
