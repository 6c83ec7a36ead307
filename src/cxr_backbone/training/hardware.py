"""What the machine is good at: which numbers it multiplies fast, how many threads it has, and who else is at work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator, PartialState
from torch import distributed

from cxr_backbone.modeling_cxr_inception import CXRInceptionModel

# After which processes that wait for one that hangs give up. (One that dies is found out about in seconds.)
TIMEOUT = timedelta(minutes=10)


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


def use_deterministic_kernels() -> None:
    """Take GPU kernels that give the same result each time, at the price of speed; where torch has none it stops with
    an error that names the operation. To be called before anything is computed. On a CPU all kernels are like that."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


def join_processes() -> PartialState:
    """This process among those that `torchrun` or `accelerate launch` started; to be called before `Accelerator()`.

    Without a GPU Accelerate joins processes only if it is told to use the CPU, and else each would train alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def inference_copy(backbone: CXRInceptionModel, accelerator: Accelerator) -> CXRInceptionModel:
    """The backbone folded (`fuse`), with weights of the precision that Accelerate's autocast would cast them to."""
    precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return backbone.fuse(precisions.get(accelerator.mixed_precision))


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process does the block alone, then the others do it, who find its results in the cache. It may decode a
    set for hours, so they wait for up to a day."""
    is_main_process, group = join_processes().is_main_process, _patient_group()
    if group is not None and not is_main_process:
        distributed.barrier(group)
    yield
    if group is not None and is_main_process:
        distributed.barrier(group)


@cache
def _patient_group() -> distributed.ProcessGroup | None:
    if not distributed.is_initialized():
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))
