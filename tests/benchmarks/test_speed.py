"""The benchmarks of speed, on a narrow network and a few drawn films: what they print, not how fast this machine is."""

import numpy as np
from PIL import Image
from tables import names, number, run

from cxr_backbone.data.synthetic import draw_phantom

NARROW = ["--model.depth_multiplier", "0.1", "--model.image_size", "75", "--data.num_patients", "60"]
SAMPLE = ["recipes/configs/sample.yaml", *NARROW]


def test_inference_times_every_way_to_run_the_network():
    (table,), printed = run("inference", "--image_size", 75, "--depth_multiplier", 0.1, "--repetitions", 2)
    ours = [name for name in names(table) if name not in ("torchvision", "timm") and "bf" not in name]
    assert ours == ["as trained", "fuse()", "onnxruntime", "OpenVINO, f32"]
    assert all(number(row[1]) > 0 and number(row[3]) > 0 for row in table)
    assert "1 thread(s)" in printed and "onnxruntime 1." in printed


def test_a_training_step_is_the_recipes_own_and_says_how_long_it_waits():
    options = ["--image_size", 75, "--batch_size", 4, "--depth_multiplier", 0.1, "--repetitions", 2]
    (table,), printed = run("training_step", *options)
    plain, augmented = table[-2:]
    assert plain[0].startswith("the recipe's step, ") and plain[0].endswith(", without augmentation")
    assert augmented[0].endswith(", augmented") and number(plain[1]) > 0 and number(augmented[1]) > 0
    assert "% is waiting for the loader." in printed


def test_startup_compares_imports_and_opening():
    (imports, opening), _ = run("startup", "--repetitions", 1, "--depth_multiplier", 0.1)
    assert names(imports) == ["torch, PreTrainedModel", "these and cxr_backbone"]
    assert number(imports[0][2]) == 1 and number(imports[1][1]) > 0
    assert names(opening)[0] == "from_pretrained"


def test_the_pipeline_is_timed_from_the_file_and_in_parts(tmp_path):
    for seed in range(3):
        Image.fromarray(np.kron(draw_phantom(seed, opacity=True), np.ones((3, 3), np.uint8))).save(
            tmp_path / f"{seed}.jpg"
        )
    (table, parts), printed = run("pipeline", tmp_path, "--depth_multiplier", 0.1, "--repetitions", 1)
    assert names(table)[0] == "ViT-base" and number(table[0][2]) == 1
    assert "ours, fuse(), read reduced, eights" in printed or "ours, fuse(bfloat16), read reduced, eights" in printed
    assert names(parts)[-2:] == ["image processor", "network"]
    assert printed.startswith("3 films, 1 thread(s)")


def test_phase_one_is_timed_both_ways_and_in_both_precisions():
    (ways, precisions), _ = run("phase_one", *SAMPLE, "--epochs", 2, "--films", 16)
    assert names(ways) == ["backbone once", "backbone in each of 2 epochs"] and number(ways[1][2]) == 1
    assert names(precisions)[0] == "no" and all(0 <= number(row[1]) <= 1 for row in precisions)


def test_the_whole_recipe_is_timed_beside_the_straightforward_way():
    options = ["--frozen_epochs", 1, "--fine_tuning.epochs", 1, "--evaluation.resamples", 100]
    tables, printed = run("whole_recipe", *SAMPLE, *options, "--evaluation.report", "false")
    plain, recipe = tables[-1]
    assert [plain[0], recipe[0]] == ["straightforward", "the recipe"] and number(plain[4]) == 1
    assert number(recipe[3]) >= number(recipe[1]) + number(recipe[2])
    assert all(0 <= number(row[5]) <= 1 for row in (plain, recipe)) and "Training alone, " in printed


def test_scaling_grows_the_films_the_images_and_the_processes():
    options = ["--image_sizes", 75, 96, "--hashes", 2000, "--patients", 60]
    (films, duplicates, images, processes), _ = run("scaling", *SAMPLE, *options)
    assert names(films) == ["decode", "audit", "features of train", "head", "loading an epoch"]
    assert names(duplicates) == ["200", "2,000"] and names(images) == ["75 x 75", "96 x 96"]
    assert names(processes) == ["1", "2"] and all(number(row[2]) > 0 for row in processes)


def test_the_page_is_timed_from_its_start_and_its_memory_is_looked_at_twice(tmp_path):
    for seed in range(2):
        Image.fromarray(draw_phantom(seed, opacity=True)).save(tmp_path / f"{seed}.png")
    (parts,), printed = run("space", tmp_path, "--uploads", 3)
    assert names(parts)[-1] == "Grad-CAM" and all(number(row[1]) > 0 for row in parts)
    assert "first answer" in printed and "after 3 uploads" in printed
