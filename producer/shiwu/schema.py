"""Writes the JSON Schema of requests and answers: `python -m shiwu.schema docs/schema`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from shiwu.contract import Answer, Request


def schemas() -> dict[str, str]:
    """File name → JSON Schema (draft 2020-12) of a request or an answer."""
    documents = {
        "request.schema.json": Request.model_json_schema(),
        "answer.schema.json": msgspec.json.schema(Answer),
    }
    return {name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in documents.items()}


def main() -> None:
    """Write the files into the folder given on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
