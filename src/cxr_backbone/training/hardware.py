"""What the machine is good at: which numbers it multiplies fast, and how many threads it has."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def choose_precision(wanted: str) -> str:
    """`wanted` ("no", "bf16", "fp16"), or for "auto": bf16 where the hardware has instructions for it, fp16 on a GPU
    without, "no" (float32) elsewhere.

    Raises:
        ValueError: if fp16 is wanted and there is no GPU.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise ValueError("run.mixed_precision=fp16 needs a GPU; use bf16, no or auto.")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # The oldest torch that is allowed can't tell what a CPU has.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def use_threads(wanted: int | None) -> None:
    """Let torch use `wanted` threads, or on a machine without a GPU all cores, shared among the processes on it.

    `accelerate launch` sets OMP_NUM_THREADS=1 for a single process, which leaves all cores of a CPU but one idle.
    """
    if wanted is None and not torch.cuda.is_available():
        wanted = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if wanted is not None:
        torch.set_num_threads(wanted)


def join_processes() -> PartialState:
    """This process among those that `torchrun` or `accelerate launch` started; to be called before `Accelerator()`.

    Without a GPU Accelerate joins processes only if it is told to use the CPU, and else each would train alone.
    """
    # While the first process decodes a set for hours, the others wait for it; by default they give up after minutes.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
