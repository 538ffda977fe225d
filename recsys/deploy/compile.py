"""The graph of a bundle as native code, by AOTInductor: for processes that have torch, and trust who wrote it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch

from recsys.deploy.graph import program_of
from recsys.errors import RecipeError
from recsys.nn.model import Model

# Where inputs are checked at run time (AOTI_RUNTIME_CHECK_INPUTS=1), the bound that is derived for a batch is 2.
_OPTIONS = {"aot_inductor.check_lowerbound": False}


def compile_graph(path: Path, model: Model) -> dict[str, Any]:
    """Write a model as a package of native code for this kind of processor; it stays as it is.

    Inputs and outputs are those of `recsys.deploy.graph.Graph`, ids within their field's range included.

    Returns:
        What the manifest tells of it: version of torch, platform, machine, and the processor's abilities it was
        compiled for.

    Raises:
        RecipeError: there is no C++ compiler, or a part of the model cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RecipeError(
            "aot: there is no C++ compiler (g++, or the one that CXX names), which native code is written with; "
            "install one, or leave `aot` out"
        ) from None
    program = program_of(model)
    path.parent.mkdir(exist_ok=True)
    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(_OPTIONS))
    except Exception as error:  # the compiler has no common class of errors
        told = next((line for line in str(error).splitlines() if line.strip()), "")
        raise RecipeError(f"aot: the model cannot be compiled: {type(error).__name__}: {told}") from error
    return {
        "torch": torch.__version__,
        "platform": sys.platform,
        "machine": platform.machine(),
        "processor": str(pick_vec_isa()).split(),
    }
