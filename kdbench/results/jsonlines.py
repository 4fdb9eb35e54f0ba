"""metrics.jsonl: one strict JSON object per line, whole lines only, numbers that round-trip exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.files import AppendFile, strict


class JsonLines:
    """Appends records to a file; see `AppendFile` for how a resumed run goes on."""

    def __init__(self, path: Path | str) -> None:
        self.file = AppendFile(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one line. NaN and infinities become the strings "nan", "inf", "-inf"."""
        text = json.dumps(strict(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        self.file.write((text + "\n").encode())


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Reads all whole lines; the unfinished last line of a run that is being written is left out."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]
