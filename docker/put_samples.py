"""Put the sample images into a bucket: `put_samples.py --endpoint-url URL --bucket NAME FOLDER`.

The key of each is its subject from samples.json in the folder: 熊猫.jpg. Credentials come from the usual AWS
chain. The store may still be starting, so it is tried again for a while.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

PAUSE_S = 0.5


def main() -> None:
    """Upload all images, or exit with an error that says why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint-url", required=True)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--patience-s", type=float, default=60.0, help="for how long a store that fails is tried again")
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    # botocore's own retries would sleep past the patience.
    config = Config(
        connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
    )
    client = boto3.client("s3", endpoint_url=asked.endpoint_url, config=config)
    samples = json.loads((asked.folder / "samples.json").read_text(encoding="utf-8"))
    deadline_s = time.monotonic() + asked.patience_s
    for sample in samples:
        body = (asked.folder / sample["file"]).read_bytes()
        _put(client, bucket=asked.bucket, key=f"{sample['label']}.jpg", body=body, deadline_s=deadline_s)
    print(f"{len(samples)} images are in s3://{asked.bucket}/")


def _put(client: Any, *, bucket: str, key: str, body: bytes, deadline_s: float) -> None:
    while True:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=body, ContentType="image/jpeg")
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline_s:
                sys.exit(f"expected to put s3://{bucket}/{key} while there was patience, got {error}")
            time.sleep(PAUSE_S)  # the store has no way to call when it is ready
        else:
            return


if __name__ == "__main__":
    main()
