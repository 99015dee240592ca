"""The rows of history in W&B's offline files, as JSON lines. Run with the train runtime's Python: it has W&B's records.

The files are logs as LevelDB writes them, after a header of 7 bytes: blocks of 32 KiB, of pieces with their own header
(checksum, length, and whether a record begins, goes on or ends there).
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, BEFORE, HEADER = 1 << 15, 7, 7
FULL, LAST = 1, 4


def records(data: bytes) -> Iterator[bytes]:
    at, record = BEFORE, b""
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield record
            record = b""


for path in sys.argv[1:]:
    for content in records(Path(path).read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            print(json.dumps(items))
