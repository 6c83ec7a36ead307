"""Precision and threads are chosen by what the machine can do, unless the user says otherwise."""

import pytest
import torch

from cxr_backbone.training.hardware import choose_precision, use_threads


@pytest.fixture
def machine(monkeypatch):
    def machine(*, gpu=False, gpu_bf16=False, cores=8, **capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr("os.cpu_count", lambda: cores)

    return machine


@pytest.fixture
def threads_set(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return calls


@pytest.mark.parametrize("wanted", ["no", "fp16", "bf16"])
def test_a_precision_that_is_asked_for_is_given(machine, wanted):
    machine(gpu=True, gpu_bf16=wanted == "no")
    assert choose_precision(wanted) == wanted


@pytest.mark.parametrize(
    "has, chosen",
    [
        ({"gpu": True, "gpu_bf16": True}, "bf16"),
        ({"gpu": True, "avx512_bf16": True}, "fp16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "no"),
        ({}, "no"),
    ],
)
def test_auto_is_what_the_hardware_multiplies(machine, has, chosen):
    machine(**has)
    assert choose_precision("auto") == chosen


def test_auto_has_an_answer_on_this_machine():
    assert choose_precision("auto") in ("no", "fp16", "bf16")


@pytest.mark.parametrize(
    "processes, cores, threads", [(None, 8, 8), ("2", 8, 4), ("3", 8, 2), ("4", 2, 1), ("1", None, 1)]
)
def test_without_a_gpu_the_processes_share_all_cores(machine, threads_set, monkeypatch, processes, cores, threads):
    machine(cores=cores)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    use_threads(None)
    assert threads_set == [threads]


def test_with_a_gpu_torch_is_left_alone(machine, threads_set):
    machine(gpu=True)
    use_threads(None)
    assert threads_set == []


@pytest.mark.parametrize("gpu", [False, True])
def test_a_number_of_threads_that_is_asked_for_is_given(machine, threads_set, gpu):
    machine(gpu=gpu)
    use_threads(3)
    assert threads_set == [3]
