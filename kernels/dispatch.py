"""Which of its paths a kernel takes: the fastest that there is, or the one that MODELZIP_KERNELS names."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .native import library


def path(*tensors: Tensor) -> str:
    """`compiled` or `reference`, for an operation on these tensors.

    Raises ValueError if MODELZIP_KERNELS names a path that is unknown, or can't be taken: only `auto` falls back.
    """
    wanted = os.environ.get("MODELZIP_KERNELS", "auto")
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if wanted == "auto":
        return "compiled" if on_cpu and library() is not None else "reference"
    if wanted not in ("reference", "compiled"):
        raise ValueError(f"MODELZIP_KERNELS is {wanted!r}; it must be auto, reference or compiled")
    if wanted == "compiled" and library() is None:
        raise ValueError("MODELZIP_KERNELS is 'compiled', but modelzip was installed without the compiled kernels")
    if wanted == "compiled" and not on_cpu:
        raise ValueError("MODELZIP_KERNELS is 'compiled', but the compiled kernels take tensors on the CPU")
    return wanted


def product_path(*tensors: Tensor) -> str:
    """The same for a matrix product, which is compiled for x86-64 with AVX2.

    With AVX-512 `auto` takes torch's, which has twice the width there. On Zen 4, whose units have half of it, ours
    takes 0.79 to 0.91 of the time; on others the two have not been timed beside each other.
    """
    found, capability = path(*tensors), torch.backends.cpu.get_cpu_capability()
    if found == "reference" or capability == "AVX2":
        return found
    if os.environ.get("MODELZIP_KERNELS", "auto") == "auto":
        return "reference"
    if capability != "AVX512":
        raise ValueError(
            f"MODELZIP_KERNELS is 'compiled', but its matrix products need AVX2; this CPU has {capability}"
        )
    return found


def moment_path(*tensors: Tensor) -> str:
    """The same for the Hessian of rows: `compiled-bf16` where they are bf16 and the CPU has units for that.

    Those sum in fp32; torch's product of bf16 would be rounded.
    """
    is_narrow = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return "compiled-bf16" if is_narrow and path(*tensors) == "compiled" and has_pairs() else product_path(*tensors)


def has_pairs() -> bool:
    """Whether a product of bf16 in pairs was compiled, and the CPU has AVX-512 BF16."""
    return hasattr(library(), "second_moment_pairs") and bool(torch.cpu._is_avx512_bf16_supported())
