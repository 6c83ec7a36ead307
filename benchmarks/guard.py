"""Does the input check (`cxr_backbone.guard`) tell what is no film of the kind that a model was trained on?

python benchmarks/guard.py --model runs/pneumonia/fine_tuned --data runs/pneumonia/config.yaml \
    [--adults path/to/rsna-normals/labels.csv] [--ankles file.dcm …]

The films that should pass are those of the test split, each asked once. Beside them: copies of them that something was
done to, patches of scikit-learn's two photos, drawn chest phantoms, adults, ankles. AUROC is that of the guard's
distance; the shares are those beyond its threshold, which validation fixed.
"""

import argparse
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.data.table_rows import read_rows
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.guard import Guard, pooled_stages
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.films import open_films
from cxr_backbone.training.hardware import use_threads
from cxr_backbone.weights import open_checkpoint

BATCH_SIZE = 16
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverted": lambda film: 255 - film,
    "clipped: what is over a third of the range is white": lambda film: np.minimum(film.astype(np.uint16) * 3, 255),
    "clipped: what is under two thirds is black": lambda film: np.maximum(film.astype(np.int16) * 3 - 510, 0),
    "upside down": lambda film: film[::-1],
    "on its side": lambda film: np.rot90(film),
    "blank, as bright as a film": lambda film: np.full_like(film, film.mean()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model with a guard")
    parser.add_argument("--data", required=True, help="YAML file with a data section")
    parser.add_argument("--adults", help="table of films of adults, paths in its column `path`")
    parser.add_argument("--ankles", nargs="*", default=[], help="files")
    parser.add_argument("--most", type=int, default=500, help="pictures of a kind")
    given, others = parser.parse_known_args()
    disable_progress_bar()
    use_threads(None)
    model, image_processor = open_checkpoint(given.model, CXRInceptionForImageClassification)
    guard, backbone = Guard.from_pretrained(given.model), model.cxr_inception.fuse()

    @torch.no_grad()
    def distances(pictures: Iterable[np.ndarray]) -> Tensor:
        pixel_values = [image_processor(picture, return_tensors="pt").pixel_values for picture in pictures]
        batches = torch.cat(pixel_values).split(BATCH_SIZE)
        features = [pooled_stages(backbone(batch, output_hidden_states=True).hidden_states) for batch in batches]
        return guard.distance(torch.cat(features))

    arguments = parse_arguments([given.data, "--run.output_dir", "unused", *others])
    opened = open_films(arguments.data, image_size=model.config.image_size, seed=arguments.run.seed)
    assert isinstance(opened, dict), "expected data.streaming=false"
    test = opened["test"].shuffle(seed=0).select(range(min(given.most, len(opened["test"]))))
    films = [np.asarray(image.convert("L")) for image in test["image"]]
    expected = distances(films)
    kinds: dict[str, Iterable[np.ndarray]] = {
        f"test films, {name}": map(change, films) for name, change in CHANGES.items()
    }
    kinds["patches of photos"] = patches(given.most)
    kinds["drawn phantoms"] = (draw_phantom(number, opacity=number % 2 == 1, image_size=299) for number in range(100))
    if given.adults:
        rows = read_rows(given.adults, "path", ())
        chosen = np.random.default_rng(0).permutation(len(rows.paths))[: given.most]
        kinds["adults"] = (read_radiograph(rows.folder / rows.paths[row]) for row in chosen)
    if given.ankles:
        kinds["ankles"] = map(read_radiograph, given.ankles)
    table = [["test films", f"{len(expected)}", "", share(expected, guard)]]
    for name, pictures in kinds.items():
        found = distances(pictures)
        truth = np.repeat([0, 1], [len(expected), len(found)])
        auroc = roc_auc_score(truth, torch.cat([expected, found]))
        table.append([name, f"{len(found)}", f"{auroc:.4f}", share(found, guard)])
    print(markdown_table(["pictures", "number", "AUROC", "out of distribution"], table))


def share(distances: Tensor, guard: Guard) -> str:
    return f"{(distances > guard.threshold).float().mean():.1%}"


def patches(number: int) -> Iterable[np.ndarray]:
    """Grey squares out of two photos, a third to all of their height."""
    random = np.random.default_rng(0)
    photos = [np.asarray(Image.fromarray(photo).convert("L")) for photo in load_sample_images().images]
    for index in range(number):
        photo = photos[index % len(photos)]
        size = int(random.integers(photo.shape[0] // 3, photo.shape[0]))
        top, left = (int(random.integers(0, length - size)) for length in photo.shape)
        yield photo[top : top + size, left : left + size]


if __name__ == "__main__":
    main()
