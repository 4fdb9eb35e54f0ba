"""TensorBoard event files that a resumed run can truncate and continue. tensorboard is imported at the first write.

TensorBoard's RecordWriter writes all records into one file with a fixed name, so that the checkpoint can store a byte
offset. (torch's SummaryWriter opens a new file per session, which would show repeated steps twice.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.files import ResumableLog

EVENT_FILE_NAME = "events.out.tfevents.0.kdbench"


class EventFile:
    """One event file of TensorBoard.

    Args:
        folder: TensorBoard's log folder; created at the first write.
    """

    def __init__(self, folder: Path | str) -> None:
        self.file = ResumableLog(Path(folder) / EVENT_FILE_NAME, complete_length=_complete_records_length)
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one value per tag; TensorBoard stores single precision."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._write(step, Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]))

    def image(self, step: int, tag: str, png: bytes, width: int, height: int) -> None:
        """Writes a PNG image."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a page of the Text tab."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(step, text_pb(tag, markdown))

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Writes a row of the HParams tab. Values other than numbers, bools and text are converted to text."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in values.items()}
        self._write(0, hparams_pb(plain, start_time_secs=time.time()))

    def _write(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        if self._writer is None:
            from tensorboard.summary.writer.record_writer import RecordWriter

            self._writer = RecordWriter(self.file)
            if self.file.offset == 0:
                self._record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._record(Event(wall_time=time.time(), step=step, summary=summary))

    def _record(self, event: Any) -> None:
        self._writer.write(event.SerializeToString(deterministic=True))


def _complete_records_length(content: bytes) -> int:
    """Returns the total length in bytes of all complete records of an event file.

    A record has a little-endian uint64 length, a checksum of 4 bytes, the data, and a checksum of 4 bytes.
    """
    end = 0
    while end + 12 <= len(content):
        record_end = end + 12 + int.from_bytes(content[end : end + 8], "little") + 4
        if record_end > len(content):
            break
        end = record_end
    return end


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to one mapping with dotted keys. Lists and None become text."""
    if not isinstance(data, Mapping):
        return {prefix: data if isinstance(data, bool | int | float | str) else str(data)}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
