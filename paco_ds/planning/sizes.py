"""Sizes in bytes: parse and format, such as 80GiB."""

from __future__ import annotations

import re

from paco_ds.errors import UserError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("I", 1024))
}


def parse_bytes(text: str, setting: str) -> int:
    """Bytes of a size such as 80GiB (2^30), 80GB (10^9), 24000MiB or plain bytes.

    Raises:
        UserError: with `setting` and the valid forms.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(
            f"{setting} {text!r} is not a size above 0; write for example 80GiB (2^30 bytes) or 80GB (10^9)"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves 1 to 4 digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
