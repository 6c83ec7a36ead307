"""Files from elsewhere that try to run code, to read what is none of their business, or to fill the memory: refused.
(Damaged and hostile films are in data/test_hostile_files.py, pickles with code in them in test_weights.py.)"""

import gzip
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from narrow import PROCESSOR, accelerator, tiny_model
from PIL import Image

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.pneumoniamnist import load_pneumoniamnist
from cxr_backbone.data.shards import open_stream
from cxr_backbone.data.table import load_table
from cxr_backbone.training.arguments import EvaluationArguments, parse_arguments
from cxr_backbone.training.examine import Examiner
from cxr_backbone.weights import load_inception_v3


class Payload:
    """Whoever unpickles it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def marker(tmp_path):
    """A file that code from elsewhere writes if it is run."""
    marker = tmp_path / "code has run"
    yield marker
    assert not marker.exists()


@pytest.fixture
def checkpoint(tmp_path):
    """Nothing wrong with it yet."""
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    PROCESSOR.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def examine(folder):
    return Examiner(accelerator(), EvaluationArguments(report=False), batch_size=1, seed=0).load(folder)


@pytest.fixture
def film(tmp_path):
    """A film that no set may hand out: it lies beside them."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


# Weights and checkpoints


def header_of_2_gb(file):
    file.write_bytes(struct.pack("<Q", 2 << 30) + b"{")
    with file.open("r+b") as opened:
        opened.truncate((2 << 30) + 100)  # a hole: it takes no room


def header_beyond_the_file(file):
    file.write_bytes(struct.pack("<Q", 1 << 20) + b"{" + b" " * 100)


@pytest.mark.parametrize("write", [header_of_2_gb, header_beyond_the_file])
def test_a_lying_safetensors_header_is_refused(checkpoint, tmp_path, write):
    write(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors can't be read as weights: .*header"):
        load_inception_v3(tmp_path / "weights.safetensors", image_mean=0.5, image_std=0.5)
    write(checkpoint / "model.safetensors")
    for read in (load_inception_v3, examine):
        with pytest.raises(ValueError, match=rf"{checkpoint} can't be read as a checkpoint: .*header"):
            read(checkpoint)


@pytest.mark.parametrize("read", [load_inception_v3, examine])
def test_a_checkpoint_of_pickles_is_refused(checkpoint, marker, read):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"classifier.output_layer.bias": Payload(marker)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        read(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        CXRInceptionForImageClassification.from_pretrained(checkpoint)


def test_a_checkpoint_whose_weights_are_listed_elsewhere_is_refused(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.output_layer.bias": "../secret.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{checkpoint} has no model\.safetensors; expected all weights in this file"):
        examine(checkpoint)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"9" * 5000])
def test_a_config_that_is_no_json_is_refused_by_name(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json can't be read as JSON"):
        load_inception_v3(checkpoint)


@pytest.mark.parametrize("change", [{"dtype": "os.system"}, {"quantization_config": {"quant_method": "quanto"}}])
def test_a_config_that_names_what_is_not_there_is_refused(checkpoint, change):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"{checkpoint} can't be read as a checkpoint"):
        examine(checkpoint)


def test_code_of_the_hub_that_a_config_names_is_not_asked_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    model = examine(checkpoint).model  # transformers alone would look for a kernel there
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("read", [load_inception_v3, examine, CXRInceptionForImageClassification.from_pretrained])
def test_code_beside_the_weights_is_not_run(checkpoint, marker, read):
    files = list(checkpoint.glob("*.py"))
    for file in files:
        file.write_text(f"open({str(marker)!r}, 'w')\n")
    assert len(files) == 4 and "auto_map" in json.loads((checkpoint / "config.json").read_text())
    read(checkpoint)


def test_a_folder_of_another_kind_of_model_is_no_way_to_have_its_code_run(checkpoint, marker):
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "other"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "modeling_cxr_inception.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match="not a folder with a CXRInception checkpoint"):
        load_inception_v3(checkpoint)


def test_code_in_a_keras_file_is_not_run(tmp_path, marker):
    code = {"class_name": "Lambda", "config": {"function": f"lambda x: open({str(marker)!r}, 'w')"}}
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": [code]}}))
        archive.writestr("model.weights.h5", b"no weights")
    with pytest.raises(ValueError, match=r"model\.keras can't be read as Keras weights"):
        load_inception_v3(tmp_path / "model.keras")


@pytest.mark.parametrize("name", ["bomb.h5", "bomb.keras", "bomb.pth"])
def test_weights_that_unpack_to_many_times_their_size_are_refused(tmp_path, name):
    h5py = pytest.importorskip("h5py")
    file = tmp_path / name
    if name == "bomb.h5":
        with h5py.File(file, "w") as content:  # 4 GB of zeros, none of them written
            content.create_dataset("conv2d/kernel:0", shape=(1 << 30,), dtype="f4", chunks=(1 << 20,))
    else:
        if name == "bomb.pth":
            torch.save({"bias": torch.zeros(8)}, file)
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.weights.h5", bytes(1 << 20))
    with pytest.raises(ValueError, match=rf"{name} can't be read as .*weights: it would unpack to [\d,]+ bytes, more"):
        load_inception_v3(file, image_mean=0.5, image_std=0.5)


def test_a_keras_array_that_is_another_file_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(b"secret!!")
    with h5py.File(tmp_path / "model.h5", "w") as file:
        outside = [(str(tmp_path / "secret"), 0, 8)]
        file.create_dataset("conv2d/kernel:0", shape=(2,), dtype="f4", external=outside)
        assert file["conv2d/kernel:0"][()].tobytes() == b"secret!!"  # whoever reads it has read that file
    with pytest.raises(ValueError, match=r"model\.h5 can't .*: its array /conv2d/kernel:0 lies in another file"):
        load_inception_v3(tmp_path / "model.h5")


# Configs


def test_code_in_a_config_is_not_run(tmp_path, marker):
    (tmp_path / "config.yaml").write_text(f"run: !!python/object/apply:builtins.open [{str(marker)!r}, w]\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML: could not determine a constructor"):
        parse_arguments([str(tmp_path / "config.yaml")])


def test_a_config_that_unfolds_to_more_than_the_memory_is_refused(tmp_path):
    fields = ["label_columns", "label_names", "label_values", "subgroup_columns", "allow_leaks"]
    lines = ["run: {output_dir: x}", "data:", "  format: table", "  source: x", f"  {fields[0]}: &a0 [{'x,' * 100}x]"]
    lines += [f"  {field}: &a{n} [{f'*a{n - 1},' * 99}*a{n - 1}]" for n, field in enumerate(fields) if n]
    (tmp_path / "config.yaml").write_text("\n".join(lines))  # 10 KB for 100 ** 5 words
    with pytest.raises(ValueError, match=r"data\.label_names holds lists"):
        parse_arguments([str(tmp_path / "config.yaml")])


# Sets


def test_objects_in_an_npz_file_are_not_unpickled(tmp_path, marker):
    names = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]
    objects = np.array([Payload(marker)], dtype=object)
    np.savez(tmp_path / "pneumoniamnist.npz", **dict.fromkeys(names, objects))
    with pytest.raises(ValueError, match=r"pneumoniamnist\.npz is no PneumoniaMNIST file: Object arrays"):
        load_pneumoniamnist(tmp_path / "pneumoniamnist.npz")


def parquet(file, path):
    """Rows with a path in place of a film's bytes."""
    image = pa.array([{"bytes": None, "path": path}], type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    feature = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "string"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    file.parent.mkdir()
    pq.write_table(pa.table({"image": image, "label": ["0"]}).replace_schema_metadata(metadata), file)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_path_in_a_shard_reads_no_file_outside_of_the_set(tmp_path, film, is_absolute):
    parquet(tmp_path / "set/train-0.parquet", str(film) if is_absolute else "../secret.png")
    with pytest.raises(ValueError, match=r"row 0 lists .*secret\.png, which is outside"):
        load_table(tmp_path / "set", label_columns=["label"], label_names=["0", "1"], patient_column="")
    stream = open_stream(str(tmp_path / "set"), label_columns=["label"], label_names=["0", "1"], patient_column="")
    with pytest.raises(ValueError, match=r"secret\.png holds no bytes of a film"):
        next(iter(stream.splits["train"]))


@pytest.mark.parametrize("name", ["../secret.png", "{}", "link.png"])
def test_a_path_in_a_table_reads_no_file_outside_of_the_set(tmp_path, film, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link.png").symlink_to(film)
    (tmp_path / "set/films.csv").write_text(f"image,label\n{name.format(film)},0\n")
    with pytest.raises(ValueError, match=r"films\.csv, line 2 lists .*, which is outside"):
        load_table(tmp_path / "set/films.csv", label_columns=["label"], label_names=["0", "1"], patient_column="")


def test_a_path_in_a_shard_of_the_kermany_set_reads_no_file(tmp_path, film):
    parquet(tmp_path / "set/train-0.parquet", str(film.rename(tmp_path / "IM-0001-0001.png")))
    with pytest.raises(ValueError, match=r"set \(train\), row 0 holds no bytes of a film"):
        load_kermany(tmp_path / "set")


@pytest.mark.parametrize("link", ["train-0.parquet", "data"])
def test_a_shard_that_is_a_link_out_of_the_set_is_refused(tmp_path, link):
    parquet(tmp_path / "other/train-0.parquet", "p.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / link).symlink_to(tmp_path / "other" / link.replace("data", ""))
    for read in (load_table, open_stream):
        with pytest.raises(ValueError, match=rf"{link} is a link out of"):
            read(str(tmp_path / "set"), label_columns=["label"], patient_column="")


def test_a_table_that_unpacks_to_more_than_any_set_needs_is_refused(tmp_path, monkeypatch):
    text = "image,label\n" + "a.png,0\n" * 1000
    (tmp_path / "films.csv").write_text(text)
    (tmp_path / "films.csv.gz").write_bytes(gzip.compress(text.encode()))
    for limit, value, message in (("ROWS", 999, "has more than 999 rows"), ("TEXT_BYTES", 99, "holds more than 99 b")):
        monkeypatch.setattr(f"cxr_backbone.data.table_rows.MAX_{limit}", value)
        for name in ("films.csv", "films.csv.gz"):
            with pytest.raises(ValueError, match=f"{name} {message}"):
                load_table(tmp_path / name, label_columns=["label"], patient_column="")


def open_tar(folder, beside, link=None):
    """A stream of one film with what lies beside it; the film may be a link."""
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for name, content in {"1.json": b'{"label": "0"}', **beside}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo("1.png")
            member.type, member.linkname = tarfile.SYMTYPE, str(link)
            archive.addfile(member)
    return open_stream(str(folder), label_columns=["label"], label_names=["0", "1"], patient_column="")


def test_a_link_in_a_tar_file_is_no_film(tmp_path, film):
    with pytest.raises(ValueError, match="has no column of films"):
        open_tar(tmp_path / "set", {}, link=film)


def test_pickles_beside_a_film_in_a_tar_file_are_not_unpickled(tmp_path, film, marker):
    array, tensors = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload(marker)], dtype=object))
    torch.save(Payload(marker), tensors)
    for name, content in (("1.npy", array), ("1.pth", tensors)):  # both of which WebDataset reads
        with pytest.raises((ValueError, pickle.UnpicklingError), match=r"allow_pickle=False|Weights only load failed"):
            open_tar(tmp_path / name, {"1.png": film.read_bytes(), name: content.getvalue()})
    stream = open_tar(tmp_path / "set", {"1.png": film.read_bytes(), "1.pyd": pickle.dumps(Payload(marker))})
    assert [row["image_id"] for row in stream.splits["train"]] == ["1.png"]


@pytest.fixture
def kermany(tmp_path, film):
    for split, first in (("train", 0), ("test", 50)):
        for number in range(first, first + 6):
            for label, name in (("NORMAL", f"IM-{number:04}-0001.png"), ("PNEUMONIA", f"person{number}_virus_1.png")):
                (tmp_path / "set" / split / label).mkdir(parents=True, exist_ok=True)
                shutil.copy(film, tmp_path / "set" / split / label / name)
    return tmp_path / "set"


def test_no_link_leads_out_of_the_kermany_set(kermany, film):
    load_kermany(kermany, num_folds=2)
    (kermany / "train/NORMAL/IM-0100-0001.png").symlink_to(film)
    with pytest.raises(ValueError, match=r"IM-0100-0001\.png is a link out of"):
        load_kermany(kermany, num_folds=2)
    (kermany / "train/NORMAL").rename(kermany / "moved")
    (kermany / "train/NORMAL").symlink_to(kermany / "moved")
    with pytest.raises(ValueError, match="NORMAL is a link out of"):
        load_kermany(kermany, num_folds=2)
