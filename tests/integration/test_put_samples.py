"""docker/put_samples.py, which fills the store of the compose file, on a real S3 store."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.dockerfiles import DOCKER, ROOT
from tests.support.processes import LOOPBACK, clean_environment, free_ports
from tests.support.servers import S3Server

SAMPLES = ROOT / "tests/support/samples"


def put_samples(*, endpoint_url: str, s3: S3Server, patience_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCKER / "put_samples.py"), "--endpoint-url", endpoint_url, "--bucket", s3.bucket]
    return subprocess.run(
        [*command, "--patience-s", str(patience_s), SAMPLES],
        env=clean_environment(
            {
                "AWS_ACCESS_KEY_ID": s3.access_key,
                "AWS_SECRET_ACCESS_KEY": s3.secret_key,
                "AWS_DEFAULT_REGION": s3.region,
            }
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_samples_are_stored_under_their_names(s3: S3Server) -> None:
    """Every file of samples.json, byte for byte."""
    done = put_samples(endpoint_url=s3.endpoint_url, s3=s3, patience_s=30)
    assert done.returncode == 0, done.stderr
    rows = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    client = s3.new_client()
    for row in rows:
        body = client.get_object(Bucket=s3.bucket, Key=f"{row['label']}.jpg")["Body"].read()
        assert body == (SAMPLES / row["file"]).read_bytes()


def test_samples_without_a_store_fail_with_an_error(s3: S3Server) -> None:
    """The command gives up, and the container of the producer is then not started."""
    done = put_samples(endpoint_url=f"http://{LOOPBACK}:{free_ports(1)[0]}", s3=s3, patience_s=0.5)
    assert done.returncode == 1
    assert "expected to put s3://" in done.stderr
    assert "Traceback" not in done.stderr
