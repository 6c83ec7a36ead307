"""Embeddings of any number of films in Parquet files: shared among processes, and to be gone on with when stopped."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cxr_backbone.data.files import IMAGE_SUFFIXES, listed_file, visible_files
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.data.table_rows import read_rows
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.atomic import replacing
from cxr_backbone.training.batches import to_images, to_pixel_values
from cxr_backbone.training.features import model_digest
from cxr_backbone.training.hardware import inference_copy

FILMS_PER_FILE = 1024  # 8 MB of embeddings; what a stop may cost
DESCRIPTION = "embeddings.json"


@dataclass(frozen=True)
class NamedFilms:
    """Films by name: `ids`, unique, and `paths` of the files."""

    ids: list[str]
    paths: list[str]


def find_films(source: str | Path, image_column: str = "image") -> NamedFilms:
    """The films of a folder, searched to the bottom, or those that a table lists.

    Args:
        source: a folder of JPEG, PNG, TIFF, BMP and DICOM files, or a .csv, .csv.gz, .jsonl or .parquet table.
        image_column: of the table: paths, relative to its folder. They are the ids; in a folder the relative paths are.

    Raises:
        FileNotFoundError: no such folder or table, or a film that the table lists and that isn't there.
        ValueError: no film; a table as `table_rows.read_rows` refuses it, with images in it instead of paths, or with a
            film in two rows.
    """
    root = Path(source)
    if root.is_dir():
        files = [path for path in visible_files(root, root) if path.suffix.lower() in IMAGE_SUFFIXES]
        films = NamedFilms([path.relative_to(root).as_posix() for path in files], [str(path) for path in files])
    elif root.is_file():
        rows = read_rows(root, image_column, ())
        if rows.folder is None or rows.embedded is not None:
            raise ValueError(f"{source} has the images themselves in column {image_column}; expected their paths.")
        paths = [listed_file(rows.folder, path, rows.where(row)) for row, path in enumerate(rows.paths)]
        films = NamedFilms(rows.image_ids, paths)
    else:
        raise FileNotFoundError(f"There is no folder or table {source}.")
    if not films.ids:
        raise ValueError(f"{source} has no films; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    if len(set(films.ids)) < len(films.ids):
        raise ValueError(f"{source} has a film in two rows; expected one row a film.")
    return films


def embed(
    model: CXRInceptionForImageClassification,
    image_processor: CXRInceptionImageProcessor,
    films: NamedFilms,
    folder: str | Path,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> dict[str, str]:
    """Write the pooled features and scores of films to `folder`, as `part-<number>.parquet` of 1,024 films each.

    Columns: `id`; `embedding`, 2,048 float32, what comes out of the backbone's average pooling; and for each label of
    the model `score <label>`, float32, as the pipeline gives it. Films are read by `read_radiograph`. Parts that are
    there already are left as they are, and each process writes others: a call that was stopped goes on.

    Args:
        batch_size: divides 1,024.
        num_workers: processes that decode ahead; 0: this one decodes between batches.

    Returns:
        Why films could not be read, by their id; they have no row. Their parts are written again by the next call.

    Raises:
        ValueError: the folder holds embeddings of other films or of another model, or at another precision; or
            `batch_size` does not divide 1,024.
        OSError: the folder can't be written.
    """
    if FILMS_PER_FILE % batch_size:
        raise ValueError(f"batch_size={batch_size} is not allowed; expected a divisor of {FILMS_PER_FILE}.")
    folder = Path(folder)
    with accelerator.main_process_first():
        _claim(folder, _description(model, image_processor, films, accelerator))
    starts = range(0, len(films.ids), FILMS_PER_FILE)
    parts = [range(start, min(start + FILMS_PER_FILE, len(films.ids))) for start in starts]
    parts = parts[accelerator.process_index :: accelerator.num_processes]
    parts = [part for part in parts if not _is_whole(_file(folder, part), len(part))]
    batches = [list(part[first : first + batch_size]) for part in parts for first in range(0, len(part), batch_size)]
    loader: DataLoader = DataLoader(
        _Squares(films.paths, image_processor.size["height"]),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=list,
        num_workers=num_workers,
    )
    forward, read = _Forward(model, image_processor, accelerator), iter(loader)
    unreadable: dict[str, str] = {}
    disable = None if accelerator.is_main_process else True
    with tqdm(total=sum(map(len, parts)), desc="embed", unit=" films", disable=disable) as bar:
        for part in parts:
            tables = []
            for _ in range(0, len(part), batch_size):
                films_read = next(read)
                tables.append(forward.table(films_read, films.ids))
                unreadable |= {films.ids[row]: found for row, found in films_read if isinstance(found, str)}
                bar.update(len(films_read))
            with replacing(_file(folder, part)) as file:
                pq.write_table(pa.concat_tables(tables), file)
    return unreadable


class _Squares:
    """Films by number, as the image processor resizes them: (number, uint8 (size, size)), or the reason why not."""

    def __init__(self, paths: Sequence[str], size: int):
        self.paths, self.size = paths, size

    def __getitem__(self, row: int) -> tuple[int, np.ndarray | str]:
        try:
            film = Image.fromarray(read_radiograph(self.paths[row]))
        except (OSError, ValueError) as reason:
            return row, str(reason)
        return row, np.asarray(film.resize((self.size, self.size), resample=Image.Resampling.BILINEAR))


class _Forward:
    def __init__(
        self,
        model: CXRInceptionForImageClassification,
        image_processor: CXRInceptionImageProcessor,
        accelerator: Accelerator,
    ):
        self.accelerator, self.image_processor = accelerator, image_processor
        self.backbone = inference_copy(model.cxr_inception, accelerator).to(accelerator.device)
        self.head = copy.deepcopy(model.classifier).float().eval().to(accelerator.device)
        self.config = model.config

    @torch.no_grad()
    def table(self, films: Sequence[tuple[int, np.ndarray | str]], ids: Sequence[str]) -> pa.Table:
        """A row for each film that could be read."""
        read = [(ids[row], pixels) for row, pixels in films if not isinstance(pixels, str)]
        width, names = self.config.hidden_sizes[-1], [f"score {name}" for name in (self.config.id2label or {}).values()]
        embeddings, scores = np.empty((0, width), np.float32), np.empty((0, len(names)), np.float32)
        if read:
            pixels = torch.from_numpy(np.stack([pixels for _, pixels in read])).unsqueeze(1)  # (films, 1, size, size)
            pixel_values = to_pixel_values(to_images(pixels.to(self.accelerator.device)), self.image_processor)
            with self.accelerator.autocast():
                features = self.backbone(pixel_values).pooler_output
            logits = self.head(features.float())
            is_multi = self.config.problem_type == "multi_label_classification"
            embeddings = features.float().cpu().numpy()
            scores = (logits.sigmoid() if is_multi else logits.softmax(dim=-1)).cpu().numpy()
        values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width)
        columns = [pa.array([film for film, _ in read], pa.string()), values, *map(pa.array, scores.T)]
        return pa.Table.from_arrays(columns, names=["id", "embedding", *names])


def _file(folder: Path, part: range) -> Path:
    return folder / f"part-{part.start // FILMS_PER_FILE:06d}.parquet"


def _is_whole(file: Path, films: int) -> bool:
    return file.is_file() and pq.read_metadata(file).num_rows == films


def _description(
    model: CXRInceptionForImageClassification,
    image_processor: CXRInceptionImageProcessor,
    films: NamedFilms,
    accelerator: Accelerator,
) -> dict[str, str | int]:
    """What the embeddings of a folder are of; all of it must agree for a call to go on with them."""
    named = hashlib.sha256("\n".join(films.ids).encode())
    return {
        "films": len(films.ids),
        "films_sha256": named.hexdigest(),
        "model_sha256": model_digest(model, image_processor).hexdigest(),
        "precision": accelerator.mixed_precision,
    }


def _claim(folder: Path, description: dict[str, str | int]) -> None:
    """Note what the folder's embeddings are of, or find that they are of the same."""
    file = folder / DESCRIPTION
    if file.is_file():
        noted = json.loads(file.read_text())
        if other := [name for name, value in description.items() if noted.get(name) != value]:
            raise ValueError(f"{folder} holds embeddings with other {', '.join(other)}; choose a new folder.")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; choose a new folder.")
    else:
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(description, indent=2) + "\n")
