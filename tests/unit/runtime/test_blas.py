"""Threads of numpy's BLAS library in the worker process."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.processes import clean_environment

SERVICE = """
import json
import torch
torch.set_num_threads(2)
from shiwu_worker.runtime.blas import use_one_blas_thread
import numpy
use_one_blas_thread()
from threadpoolctl import ThreadpoolController
info = ThreadpoolController().info()
blas = [each["num_threads"] for each in info if each["internal_api"] == "openblas"]
print(json.dumps([blas, torch.get_num_threads()]))
"""


def test_blas_has_one_thread_and_torch_keeps_its_own() -> None:
    environment = clean_environment({"OPENBLAS_NUM_THREADS": "2"})
    ran = subprocess.run(
        [sys.executable, "-c", SERVICE], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    blas, torch_threads = json.loads(ran.stdout)
    assert blas
    assert set(blas) == {1}
    assert torch_threads == 2
