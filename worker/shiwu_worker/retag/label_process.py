"""Runs the text tower in a process of its own, and starts reading vectors when all memory of that process is free.

Imports nothing heavy: while that process has its most memory, this one is to have little.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import TYPE_CHECKING

from shiwu_worker.retag.options import RetagOptions

if TYPE_CHECKING:
    from shiwu_worker.retag.label_texts import Failure, Prepared


def prepare_labels(options: RetagOptions) -> Prepared | Failure:
    """Encode all labels, and return what scoring needs.

    Raises:
        SystemExit: the settings are wrong; the process has printed why.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        raw = pool.submit(_prepare, options).result()
    # Not by the pool: this loads numpy, and the process would not have ended yet.
    result: Prepared | Failure = pickle.loads(raw)  # noqa: S301 a process of this command made it
    return result


def _prepare(options: RetagOptions) -> bytes:
    # By its name, because the process that waits must not import it.
    return pickle.dumps(import_module("shiwu_worker.retag.label_texts").prepare(options))
