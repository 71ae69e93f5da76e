"""The command that prints the labels behind a digest."""

from __future__ import annotations

import click
import msgspec

from shiwu.cli.base import Exit, end, main
from shiwu.cli.terminal import echo_data, echo_json
from shiwu.client.client import Client


@main.command()
@click.argument("digest")
@click.option("--json", "as_json", is_flag=True, help="The whole set as JSON: name, labels, templates, head.")
@click.pass_obj
def labels(client: Client, /, *, digest: str, as_json: bool) -> None:
    """Print the labels behind the digest of an answer (`labels.digest`), one a line."""
    known = client.known_labels(digest)
    if known is None:
        end(f"expected the digest of a label set that a worker has stored, got {digest}", Exit.NOT_TAGGED)
    if as_json:
        echo_json(msgspec.json.encode(known))
        return
    for label in known.labels:
        echo_data(label)
