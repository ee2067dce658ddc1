"""Forks trainers that have torch imported already: a child runs the script ``argv[0]`` as ``__main__``."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback

import torch
import torch._dynamo  # what the first optimizer hook would import
import torch.distributed

import ckptd_client  # noqa: F401  what trainers import, imported once for all of them
from bench.fork_server import serve
from ckptd import failpoints


def become(argv: list[str]) -> int:
    """In the child: be the trainer; its exit code."""
    importlib.reload(failpoints)  # it reads the environment when imported
    torch.set_num_threads(1)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # beside this folder, which is there already
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter does at the top of a script
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(become)
