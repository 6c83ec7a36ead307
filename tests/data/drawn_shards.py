"""Shards of drawn films, as Parquet and as WebDataset files."""

import io
import json
import tarfile
from pathlib import Path

import datasets
from PIL import Image

from cxr_backbone.data.synthetic import draw_phantom

NAMES = ["NORMAL", "PNEUMONIA"]
CLASSES = datasets.ClassLabel(names=NAMES)


def films(number):
    """Drawn films of patients with two films each, every second patient ill."""
    for film in range(number):
        png = io.BytesIO()
        Image.fromarray(draw_phantom(film, opacity=film // 2 % 2 == 1, image_size=64)).save(png, "PNG")
        yield {"bytes": png.getvalue(), "path": f"{film}.png"}, film // 2 % 2, f"p{film // 2}"


def write_parquet(folder, number=24, shards=2, split="train", label=CLASSES, changed=None):
    folder.mkdir(exist_ok=True)
    rows = [{"image": image, "label": ill, "patient_id": patient} for image, ill, patient in films(number)]
    rows[5] |= changed or {}
    features = {"image": datasets.Image(), "label": label, "patient_id": datasets.Value("string")}
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    for index in range(shards):
        dataset.shard(shards, index).to_parquet(folder / f"{split}-{index}.parquet")
    return folder


def write_tars(folder, number=24, shards=2, split="train", beside=lambda ill: {"label": NAMES[ill]}, suffix="png"):
    folder.mkdir(exist_ok=True)
    for index in range(shards):
        with tarfile.open(folder / f"{split}-{index}.tar", "w") as tar:
            for image, ill, patient in list(films(number))[index::shards]:
                text = json.dumps({**beside(ill), "patient_id": patient}).encode()
                key = Path(image["path"]).stem
                for name, content in ((f"{key}.{suffix}", image["bytes"]), (f"{key}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
