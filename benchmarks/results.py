"""Keeps `benchmarks/RESULTS.md`: one section per benchmark, replaced by its latest run."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def record(section: str, text: str) -> None:
    """Prints the outcome of a benchmark and makes it the section of that name."""
    told = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}."
    body = f"## {section}\n{told}\n\n{text.strip()}\n"
    print(body)
    old = RESULTS.read_text() if RESULTS.exists() else "# Results of the benchmarks\n"
    pattern = re.compile(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    new = pattern.sub(lambda _: body + "\n", old) if pattern.search(old) else f"{old.rstrip()}\n\n{body}"
    RESULTS.write_text(new.rstrip() + "\n")
