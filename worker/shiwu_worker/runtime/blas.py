"""Threads of numpy's BLAS library."""

from __future__ import annotations

from threadpoolctl import ThreadpoolController


def use_one_blas_thread() -> None:
    """Make numpy's OpenBLAS compute on the calling thread only; torch's threads stay as they are.

    The matrix product of a batch with 256 labels takes less than a millisecond, after which OpenBLAS threads would keep
    cores busy that the model and the loaders need. Call it after numpy is imported.
    """
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
