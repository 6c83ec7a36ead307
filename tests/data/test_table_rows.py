"""Rows come with the text of their cells and the line they stand on; a damaged table is refused."""

import gzip

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_backbone.data.table_rows import as_text, patient_text, read_rows


def read(table, content):
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(table, "image", ["label"])


def test_lines_are_counted_past_blank_lines_and_line_breaks_in_quotes(tmp_path):
    rows = read(tmp_path / "t.csv", 'image,label,report\na.png,1,"two\nlines"\n\nb.png, 0 ,\n')
    assert rows.paths == rows.image_ids == ["a.png", "b.png"] and rows.columns == {"label": ["1", "0"]}
    assert rows.where(0) == f"{tmp_path / 't.csv'}, line 3" and rows.where(1).endswith("line 5")
    rows = read(tmp_path / "t.jsonl", '{"image": "a.png", "label": 1}\n\n{"label": null, "image": "b.png"}')
    assert rows.columns == {"label": ["1", ""]} and rows.where(1).endswith("t.jsonl, line 3")


def test_a_byte_order_mark_and_gzip_are_no_obstacle(tmp_path):
    content = "image,label\r\na.png,1\r\n".encode("utf-8-sig")
    assert read(tmp_path / "t.csv", content).columns == {"label": ["1"]}
    assert read(tmp_path / "t.csv.gz", gzip.compress(content, mtime=0)).columns == {"label": ["1"]}


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, ""), (float("nan"), ""), ("NaN", ""), (1.0, "1"), (True, "1"), (-1, "-1"), (0.5, "0.5"), (" 007 ", "007")],
)
def test_a_cell_reads_as_csv_would_write_it(cell, text):
    assert as_text(cell, "here") == text


@pytest.mark.parametrize("cell", [[1], {"a": 1}, b"1"])
def test_a_cell_that_is_no_text_and_no_number_is_refused(cell):
    with pytest.raises(ValueError, match=r"line 2 is a .*; expected text or a number"):
        as_text(cell, "line 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,label\na.png\n", "line 2 has more or fewer fields than the header"),
        ("t.csv", "image,label\na.png,1,2\n", "line 2 has more or fewer fields than the header"),
        ("t.csv", "image,label,label\na.png,1,2\n", "has the column 'label' twice"),
        ("t.csv", "image,finding\na.png,1\n", r"lacks the columns label; it has .*finding"),
        ("t.csv", "image,label\n", "has no rows"),
        ("t.csv", "", "has no rows"),
        ("t.csv", "image,label\n\xff\xfe,1\n".encode("latin-1"), "is damaged or not UTF-8 text"),
        ("t.csv.gz", "image,label\na.png,1\n", "is damaged or not UTF-8 text"),
        ("t.csv", b'image,label\na.png,1\nb.png,"1\nc.png,1\n', "is not CSV"),
        ("t.csv.gz", gzip.compress(b"image,label\n" + b"a.png,1\n" * 99, mtime=0)[:-9], "is damaged or not UTF-8 text"),
        ("t.csv", "image,label\n" + "a" * 200_000 + ",1\n", "line 1 is not CSV: field larger than field limit"),
        ("t.jsonl", '{"image": "a.png", "label": 1}\n[1]\n', "line 2 is no JSON object"),
        ("t.jsonl", '{"image": "a.png"\n', "line 1 is no JSON object"),
        ("t.jsonl", "[" * 100_000, "line 1 is no JSON object"),
        ("t.jsonl", '{"image": "a.png", "label": ' + "9" * 5000 + "}", "line 1 is no JSON object"),
        ("t.jsonl", '{"image": "a.png", "label": [1]}\n', "line 1, column label is a list; expected text or a number"),
        ("t.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("t.xlsx", "", r"is no table; expected \.csv, \.csv\.gz, \.jsonl or \.parquet"),
        ("t.parquet", "PAR1", r"t\.parquet can't be read as Parquet"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content)


@settings(deadline=None)
@given(content=st.binary(max_size=200) | st.text(alphabet='image,label\n"\r\0{}:1 ', max_size=200).map(str.encode))
@pytest.mark.parametrize("name", ["fuzz.csv", "fuzz.csv.gz", "fuzz.jsonl"])
def test_whatever_is_in_a_table_it_is_read_or_refused(tmp_path_factory, name, content):
    try:
        rows = read(tmp_path_factory.getbasetemp() / name, content)
    except ValueError as refusal:
        assert name in str(refusal)
    else:
        assert len(rows.paths) == len(rows.columns["label"]) > 0


def test_metadata_of_split_folders_brings_the_splits(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n1.png,{split}\n")
    rows = read_rows(tmp_path, "file_name", ["label"])
    assert rows.paths == ["train/1.png", "val/1.png"] and rows.splits == ["train", "validation"]
    assert rows.folder == tmp_path and rows.where(1) == f"{tmp_path}/val/metadata.csv, line 2"
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="expected one for the folder, or one for each split folder"):
        read_rows(tmp_path, "file_name", ["label"])


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither Parquet shards such as train-00000-of-00001\.parquet, nor metadata"):
        read_rows(tmp_path, "image", ["label"])
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*gone\.csv"):
        read_rows(tmp_path / "gone.csv", "image", ["label"])


def test_splits_that_are_unknown_or_the_same_are_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "label": [1]})
    for first, second, message in [("train", "extra", "has the split 'extra'"), ("val", "dev", "two are the same")]:
        (tmp_path / first).mkdir()
        for split in (first, second):
            rows.to_parquet(tmp_path / first / f"{split}-00000.parquet")
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / first, "image", ["label"])


def test_a_patient_is_the_same_however_a_table_writes_the_number():
    assert {patient_text(value, "line 2") for value in (7, 7.0, "7", "7.0", " 7 ")} == {"7"}
    assert patient_text("007", "line 2") == "007" and patient_text(None, "line 2") == ""


def test_a_column_that_holds_no_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"image": [1.5], "label": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(
        ValueError, match=r"t\.parquet has .*float64.* in column image; expected paths, bytes or images"
    ):
        read_rows(tmp_path / "t.parquet", "image", ["label"])
