"""Lets Python's cyclic garbage collector run rarely, and not visit objects that live as long as the worker.

torch, transformers and Celery create several hundred thousand objects. A full collection visits all of them and stops
every thread of the worker for 0.3 s. Jobs in flight cause such collections repeatedly.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Final

YOUNG_OBJECTS: Final = 10_000
"""A collection begins when so many more objects were created than freed. About as many belong to the jobs in flight,
which have no cycles. With Python's default of 700 or 2,000 every hundredth job causes a collection that
frees nothing."""


def freeze_imported() -> None:
    """Exempt the objects that imports have created, so that collections during the rest of the start are short.

    They stay exempt until the stack that is given to `freeze_started` is closed.
    """
    gc.freeze()


def freeze_started(stack: ExitStack) -> None:
    """Collect once, then exempt all objects that exist from later collections until the stack is closed.

    Without the collection, cyclic garbage from the start would stay in memory until then. Later collections are rarer.
    """
    gc.collect()
    stack.callback(gc.unfreeze)
    gc.freeze()
    young, *older = gc.get_threshold()
    stack.callback(gc.set_threshold, young, *older)
    gc.set_threshold(YOUNG_OBJECTS, *older)
