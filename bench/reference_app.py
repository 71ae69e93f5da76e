"""The script that shiwu replaces, in a Celery task: `celery -A bench.reference_app:app worker --pool=solo …`.

AutoModel and AutoProcessor, six candidate labels, one image at a time, softmax, the best five. The model is loaded
when the module is imported: only a worker process may import this module.
"""

from __future__ import annotations

import io
import os
from typing import Any, Final

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from bench.celery_app import TASK, TOP, WORDS, make_app
from bench.sources import fetch
from shiwu_worker.runtime.cpus import usable_cores

FOLDER: Final = os.environ["BENCH_MODEL"]
DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"

torch.set_num_threads(usable_cores())
# FP32, as the published checkpoint is stored; the embedded one is stored in FP16, in which a CPU is slow.
model: Any = (
    AutoModel.from_pretrained(FOLDER, local_files_only=True, trust_remote_code=False, dtype=torch.float32)
    .to(DEVICE)
    .eval()
)
processor: Any = AutoProcessor.from_pretrained(FOLDER, local_files_only=True, trust_remote_code=False)
app = make_app("reference")


def recognise(picture: Image.Image) -> list[dict[str, Any]]:
    """Do what the script does."""
    inputs = processor(text=list(WORDS), images=picture, return_tensors="pt", padding=True).to(DEVICE)
    with torch.no_grad():
        scores = model(**inputs).logits_per_image.softmax(dim=1)[0]
    best = scores.topk(TOP)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"label": WORDS[index], "score": score} for index, score in pairs]


@app.task(name=TASK, shared=False)  # type: ignore[untyped-decorator]  # celery has no types
def tag(image: str) -> dict[str, Any]:
    """Tag one image."""
    with Image.open(io.BytesIO(fetch(image))) as picture:
        return {"tags": recognise(picture.convert("RGB")), "batch_size": 1}


recognise(Image.new("RGB", (64, 64)))  # the first call is slow, so it is made before the first job
