"""Precision and threads are chosen by what the machine can do, unless the user says otherwise."""

import os

import pytest
import torch

from cxr_backbone.training.hardware import (
    choose_precision,
    join_processes,
    main_process_first,
    use_deterministic_kernels,
    use_threads,
)


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


def test_fp16_without_a_gpu_is_refused_with_what_there_is(machine):
    machine(gpu=False)
    with pytest.raises(ValueError, match=r"run\.mixed_precision=fp16 needs a GPU; use bf16, no or auto"):
        choose_precision("fp16")


@pytest.mark.parametrize(("chosen", "left"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_kernels_that_differ_from_time_to_time_are_refused(monkeypatch, chosen, left):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen or "")
    if not chosen:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == left
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_process_alone_is_the_main_one_and_waits_for_nobody():
    assert join_processes().is_main_process
    with main_process_first():
        pass
