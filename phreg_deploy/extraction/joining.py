"""Join the journals of all shards into ``features.json``, line by line, so the number of images is not bound."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from phreg_deploy.errors import RESUME, PhregError
from phreg_deploy.extraction.feature_files import INDEX
from phreg_deploy.extraction.inputs.shards import Shard
from phreg_deploy.extraction.parts import PARTS, PLAN, Journal, journal_path, read_groups
from phreg_deploy.files.temporary import make_locked_file, remove_dead
from phreg_deploy.json_files import read_json


def join_parts(output: Path, heads: list[dict[str, Any]]) -> bool:
    """Write ``features.json`` if every shard is complete; return whether it was written.

    Images stand in the order of their shards. Processes that finish at once may all join: each writes the same index.

    Args:
        heads: of ``ExtractionTask``.

    Raises:
        PhregError: a file of a finished image is missing or has another size.
    """
    plan = read_json(output / PLAN)
    shards = [Shard(number, plan["shards"]) for number in range(1, plan["shards"] + 1)]
    if not all(is_complete(output, shard) for shard in shards):
        return False
    whole = Journal()
    for shard in shards:
        for group in read_groups(journal_path(output, shard), whole):
            for name, (size, _) in group.files.items():
                if not (output / name).is_file() or (output / name).stat().st_size != size:
                    raise PhregError(
                        f"extract: {output / name} is missing or has another size than {size} bytes; run shard "
                        f"{shard} again with {RESUME}."
                    )
    head = {
        "output": str(output),
        "backend": ", ".join(sorted(set(whole.backends))),
        "settings": plan["settings"],
        "format": plan["format"],
        "shards": plan["shards"],
        "complete": True,
        "skipped": whole.skipped,
        "heads": heads,
    }
    remove_dead(output / PARTS)
    draft, descriptor = make_locked_file(output / PARTS / INDEX)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1)[:-2] + ',\n "images": [')
            comma = ""
            for shard in shards:
                for group in read_groups(journal_path(output, shard)):
                    digests = {name: digest for name, (_, digest) in group.files.items()}
                    for entry in group.images:
                        file.write(f"{comma}\n  {json.dumps({**entry, 'sha256': digests})}")
                        comma = ","
            file.write("\n ]\n}\n")
            file.flush()
            os.replace(draft, output / INDEX)
    finally:
        draft.unlink(missing_ok=True)
    return True


def is_complete(output: Path, shard: Shard) -> bool:
    """Whether the journal of a shard ends with its mark."""
    path = journal_path(output, shard)
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            tail = file.read()
    except FileNotFoundError:
        return False
    last = tail.splitlines(keepends=True)[-1:]
    return bool(last) and last[0].endswith(b"\n") and last[0].startswith(b'{"complete": true')
