"""The whole service against the bare model: pictures a second from Redis to Redis, and in a plain loop."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tests.support import pictures
from tests.support.servers import Valkey, WorkerProcess

from shiwu import Client
from shiwu.contract import Stage


@dataclass(frozen=True)
class Service:
    """Pictures a second, and where a picture's time went (mean ms)."""

    bare_per_second: float
    service_per_second: float
    ratio: float
    stages_ms: dict[str, float]
    mean_batch: float
    pictures: int


def _bare(count: int) -> float:
    """Encode and score prepared pixels in a loop, with the service's own encoder and batch size."""
    from shiwu_worker.config import Settings  # noqa: PLC0415 torch is imported by what follows
    from shiwu_worker.image_spec import read_image_spec  # noqa: PLC0415
    from shiwu_worker.models import model_folder  # noqa: PLC0415
    from shiwu_worker.parts import open_encoder  # noqa: PLC0415

    settings = Settings()
    folder = model_folder(settings.model)
    spec = read_image_spec(folder)
    encoder = open_encoder(settings, folder, spec)
    labels = encoder.encode_texts(["动物", "人物", "交通工具", "食物", "建筑", "植物"])
    batch = np.random.default_rng(0).integers(0, 256, (encoder.rungs[-1], spec.height, spec.width, 3), np.uint8)
    began_s = time.monotonic()
    for _ in range(max(1, count // len(batch))):
        encoder.encode(batch) @ labels.T
    return max(1, count // len(batch)) * len(batch) / (time.monotonic() - began_s)


def run(out: Path, *, count: int = 3000) -> Service:
    """Measure the bare loop, then the service on the same machine. Writes service.json."""
    bare = _bare(count)
    with tempfile.TemporaryDirectory() as name, Valkey(folder=Path(name)) as server:
        folder = Path(name) / "pictures"
        folder.mkdir()
        for sample in pictures.samples():
            (folder / sample.path.name).write_bytes(sample.data)
        references = [path.as_uri() for path in sorted(folder.iterdir())]
        with (
            WorkerProcess(redis_url=server.url, folder=Path(name), allow_folders=folder, log_level="warning") as worker,
            Client(server.url) as client,
        ):
            worker.wait_ready()
            client.wait_many(client.enqueue_many(references), timeout_s=60)
            began_s = time.monotonic()
            ids = list(client.enqueue_many(references[n % len(references)] for n in range(count)))
            answers = client.wait_many(ids, timeout_s=300).values()
            per_second = count / (time.monotonic() - began_s)
    stages = [stage.value for stage in Stage if stage is not Stage.COMMIT]
    result = Service(
        bare_per_second=bare,
        service_per_second=per_second,
        ratio=per_second / bare,
        stages_ms={name: float(np.mean([getattr(one.timing, name) for one in answers])) for name in stages},
        mean_batch=float(np.mean([one.batch_size or 0 for one in answers])),
        pictures=count,
    )
    (out / "service.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result
