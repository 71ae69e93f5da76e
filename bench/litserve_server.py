"""LitServe with the same model, as a careful user would write it: `python -m bench.litserve_server PORT`.

Batches across requests, images of a batch decoded by several threads, label vectors computed once, the dtype of
shiwu's worker, warm before it reports healthy. Its pixels are made by transformers' own processor.
"""

# Not `from __future__ import annotations`: LitServe reads the annotations of its hooks as objects.
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import litserve  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an extra
import numpy as np
import torch
from fastapi import Body  # type: ignore[import-not-found, unused-ignore]  # comes with it
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from bench.celery_app import TOP, WORDS
from shiwu_worker.runtime.cpus import usable_cores

Picture = Annotated[bytes, Body(media_type="application/octet-stream")]


class TagServer(litserve.LitAPI):  # type: ignore[misc, unused-ignore]  # litserve has no types
    """Turns the bytes of an image into its best labels."""

    def setup(self, device: str) -> None:
        """Load, encode the labels, warm up."""
        folder = os.environ["BENCH_MODEL"]
        torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
        self.dtype = getattr(torch, os.environ["BENCH_DTYPE"])
        self.model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)(
            list(WORDS), padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            self.labels = _unit(self.model.get_text_features(**tokens)).to(device)
        self.scale = float(self.model.logit_scale.exp())
        self.model = self.model.to(device=device, dtype=self.dtype)
        self.decoders = ThreadPoolExecutor(usable_cores())
        blank = io.BytesIO()
        Image.new("RGB", (64, 64)).save(blank, "PNG")
        for size in (1, self.max_batch_size):
            self.predict(self.batch([blank.getvalue()] * size))

    def decode_request(self, request: Picture) -> bytes:
        """Do nothing: a batch is decoded together, by several threads."""
        return request

    def batch(self, inputs: list[bytes]) -> torch.Tensor:
        """Turn images into one tensor."""
        return torch.from_numpy(np.concatenate(list(self.decoders.map(self._pixels, inputs))))

    def _pixels(self, data: bytes) -> NDArray[np.float32]:
        # As numpy: torch would start helper threads for each of these threads.
        with Image.open(io.BytesIO(data)) as picture:
            pixels: NDArray[np.float32] = self.processor(images=picture.convert("RGB"), return_tensors="np")[
                "pixel_values"
            ]
        return pixels

    def predict(self, x: torch.Tensor) -> tuple[list[list[float]], list[list[int]]]:
        """Run one forward pass; return scores and label numbers of the best labels of each image."""
        with torch.inference_mode():
            vectors = _unit(self.model.get_image_features(pixel_values=x.to(self.labels.device, self.dtype)))
            best = (vectors @ self.labels.T * self.scale).softmax(dim=1).topk(TOP)
        return best.values.tolist(), best.indices.tolist()

    def unbatch(self, output: tuple[list[list[float]], list[list[int]]]) -> list[dict[str, Any]]:
        """Return one answer per image."""
        scores, numbers = output
        return [
            {"batch_size": len(scores), "tags": _tags(own, which)} for own, which in zip(scores, numbers, strict=True)
        ]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return it unchanged."""
        return output


def _tags(scores: list[float], numbers: list[int]) -> list[dict[str, Any]]:
    return [{"label": WORDS[number], "score": score} for score, number in zip(scores, numbers, strict=True)]


def _unit(features: Any) -> torch.Tensor:
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


def main() -> None:
    """Serve until killed."""
    workers = int(os.environ["BENCH_WORKERS"])
    api = TagServer(
        max_batch_size=int(os.environ["BENCH_MAX_BATCH"]), batch_timeout=float(os.environ["BENCH_BATCH_TIMEOUT_S"])
    )
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    server = litserve.LitServer(
        api, accelerator=accelerator, devices=1, workers_per_device=workers, timeout=600, fast_queue=True
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
