"""Keeps Python's cycle collector away from objects that live as long as the worker.

torch, transformers and Celery create several hundred thousand objects. A full collection visits all of them, 0.3 s in
which no thread of the worker runs, and jobs in flight cause such collections again and again.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack


def freeze_imported() -> None:
    """Exempt the objects that imports have created, so that collections during the rest of the start are short.

    They stay exempt until the stack that `freeze_started` gets is closed.
    """
    gc.freeze()


def freeze_started(stack: ExitStack) -> None:
    """Collect once, then exempt all objects that exist from later collections until the stack is closed.

    Without the collection, cyclic garbage of the start would stay in memory until then.
    """
    gc.collect()
    stack.callback(gc.unfreeze)
    gc.freeze()
