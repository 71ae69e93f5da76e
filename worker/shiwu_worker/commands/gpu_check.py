"""Checks the GPUs and their driver, for `shiwu-worker --check`; the model is tried on the first of them only."""

from __future__ import annotations

from shiwu_worker.config.settings import Settings
from shiwu_worker.runtime.nvidia import driver_version, fault_of, gpus_are_hidden, list_gpus, unusable_gpus, why_no_gpu


def check_gpus(settings: Settings) -> tuple[str, tuple[str, ...]]:
    """Return driver, version of CUDA and GPUs, and warnings about GPUs that an operator has to look after."""
    if settings.device == "cpu" or gpus_are_hidden():
        return "none is used (SHIWU_DEVICE, CUDA_VISIBLE_DEVICES)", ()
    driver, gpus = driver_version(), list_gpus()
    if driver is None or not gpus:
        reason = why_no_gpu()
        return f"none is found; the driver is {driver or 'absent'}", (reason,) if reason else ()
    import torch  # noqa: PLC0415 takes seconds, which --help must not

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    names = ", ".join(f"{gpu.name} ({gpu.uuid})" for gpu in gpus[:16])
    faults = {gpu.gpu: fault for gpu in gpus if (fault := fault_of(gpu.gpu_uuid))}
    faulty = [f"gpu{number}: {fault}" for number, fault in faults.items()]
    left_out = [f"{gpu.name}: {gpu.reason}; it gets no worker" for gpu in unusable_gpus()]
    return f"{names}; driver {driver}; torch {torch.__version__} is built for {built}", (*faulty, *left_out)
