"""Embeddings: what the backbone and the pipeline say of each film, under its name, whatever happens in between."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from narrow import PROCESSOR, accelerator, in_use, tiny_model
from PIL import Image
from running import ROOT
from transformers import pipeline

from cxr_backbone import embeddings
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.embeddings import embed, find_films

FILMS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    (folder / "ward").mkdir()
    for film in range(FILMS):
        place = folder / "ward" if film % 2 else folder
        Image.fromarray(draw_phantom(film, opacity=film % 3 == 0, image_size=90)).save(place / f"{film}.png")
    (folder / "notes.txt").write_text("no film")
    return folder


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(embeddings, "FILMS_PER_FILE", 4)


@pytest.fixture(scope="module")
def model():
    return in_use(tiny_model())


def rows_in(folder):
    tables = [pq.read_table(file).to_pandas() for file in sorted(folder.glob("*.parquet"))]
    return {row["id"]: row for table in tables for _, row in table.iterrows()}


def embed_in(output, model, films, **options):
    return embed(model, PROCESSOR, films, output, accelerator(), **{"batch_size": 2} | options)


def test_a_folder_is_searched_to_the_bottom_for_films_alone(folder):
    films = find_films(folder)
    assert sorted(films.ids) == sorted(f"ward/{film}.png" if film % 2 else f"{film}.png" for film in range(FILMS))


def test_a_table_lists_its_films(folder, tmp_path):
    table = folder / "films.csv"
    table.write_text("film,age\n0.png,3\nward/1.png,4\n")
    assert find_films(table, "film").ids == ["0.png", "ward/1.png"]
    table.unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [("film\n0.png\n0.png\n", "a film in two rows"), ("film\nnone.png\n", "none.png"), ("image\n0.png\n", "film")],
)
def test_a_table_that_cannot_be_meant_is_refused(folder, text, message):
    table = folder / "wrong.csv"
    table.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_films(table, "film")
    table.unlink()


def test_nothing_to_embed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no films"):
        find_films(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_films(tmp_path / "nowhere")


def test_embedding_and_scores_are_those_of_the_model_and_of_the_pipeline(folder, model, tmp_path):
    assert embed_in(tmp_path / "out", model, find_films(folder)) == {}
    rows = rows_in(tmp_path / "out")
    classify = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    for name, row in rows.items():
        film = read_radiograph(folder / name)
        with torch.no_grad():
            pooled = model.cxr_inception(**PROCESSOR(film, return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(row["embedding"], pooled, rtol=1e-4, atol=1e-5)
        for answer in classify(Image.fromarray(film), top_k=None):
            assert row[f"score {answer['label']}"] == pytest.approx(answer["score"], abs=1e-5)
    assert len(rows) == FILMS


def test_findings_have_a_score_each(folder, tmp_path):
    model = in_use(tiny_model(3, problem_type="multi_label_classification"))
    embed_in(tmp_path / "out", model, find_films(folder))
    scores = np.array(
        [[row[f"score class {label}"] for label in range(3)] for row in rows_in(tmp_path / "out").values()]
    )
    assert not np.allclose(scores.sum(axis=1), 1)


def test_datasets_reads_the_files(folder, model, tmp_path):
    embed_in(tmp_path / "out", model, find_films(folder))
    rows = load_dataset("parquet", data_files=str(tmp_path / "out/*.parquet"), split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == FILMS
    assert len(rows[0]["embedding"]) == model.config.hidden_sizes[-1]


def test_parts_that_are_there_are_left_alone_and_missing_ones_written(folder, model, tmp_path):
    films, out = find_films(folder), tmp_path / "out"
    embed_in(out, model, films)
    whole = rows_in(out)
    first, second, _ = sorted(out.glob("*.parquet"))
    second.unlink()
    written = first.stat().st_mtime_ns
    embed_in(out, model, films)
    assert first.stat().st_mtime_ns == written
    again = rows_in(out)
    assert again.keys() == whole.keys()
    for name, row in whole.items():
        np.testing.assert_array_equal(again[name]["embedding"], row["embedding"])


def test_embeddings_of_two_models_are_never_mixed(folder, model, tmp_path):
    embed_in(tmp_path / "out", model, find_films(folder))
    with pytest.raises(ValueError, match="model_sha256; choose a new folder"):
        embed_in(tmp_path / "out", tiny_model(), find_films(folder))


def test_a_folder_with_other_files_is_left_alone(folder, model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        embed_in(tmp_path, model, find_films(folder))


def test_a_batch_size_that_does_not_fill_a_file_is_refused(folder, model, tmp_path):
    with pytest.raises(ValueError, match="batch_size=3"):
        embed_in(tmp_path / "out", model, find_films(folder), batch_size=3)


def test_a_film_that_cannot_be_read_is_named_and_the_others_are_embedded(folder, model, tmp_path):
    broken = folder / "broken.png"
    broken.write_bytes((folder / "0.png").read_bytes()[:200])
    reasons = embed_in(tmp_path / "out", model, find_films(folder))
    assert set(reasons) == {"broken.png"}
    assert str(broken) in reasons["broken.png"]
    assert len(rows_in(tmp_path / "out")) == FILMS
    Image.fromarray(draw_phantom(99, opacity=False, image_size=90)).save(broken)  # repaired: its part is written again
    assert embed_in(tmp_path / "out", model, find_films(folder)) == {}
    assert len(rows_in(tmp_path / "out")) == FILMS + 1
    broken.unlink()


def recipe(*words, processes=1):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, "recipes/embed.py", "--precision", "no", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_write_what_one_writes(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    embed_in(tmp_path / "one", model, find_films(folder))
    done = recipe("--model", tmp_path / "model", "--films", folder, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert f"{FILMS} of {FILMS} films" in done.stdout
    one, two = rows_in(tmp_path / "one"), rows_in(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, row in one.items():
        np.testing.assert_allclose(two[name]["embedding"], row["embedding"], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "two/embeddings.json").read_text())["films"] == FILMS


def test_the_recipe_lists_what_it_cannot_read_and_fails(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    films = tmp_path / "films"
    films.mkdir()
    (films / "good.png").write_bytes((folder / "0.png").read_bytes())
    (films / "bad.png").write_bytes(b"not a film")
    done = recipe("--model", tmp_path / "model", "--films", films, "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "1 films can't be read" in done.stderr and "bad.png" in done.stderr
    assert "bad.png" in (tmp_path / "out/unreadable.csv").read_text()
