"""Numbers as people read them: sizes, durations, counts and rates."""


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 950 bytes, 1.2 MB, 64 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= 0.9995 * factor:
            return f"{_short(n_bytes / factor)} {unit}"
    return f"{n_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: 0.4 s, 36 s, 6.1 minutes, 2.5 hours, 3.1 days."""
    if seconds < 59.5:
        return f"{_short(seconds)} s"
    if seconds < 59.5 * 60:
        return f"{_short(seconds / 60)} minutes"
    if seconds < 47.5 * 3600:
        return f"{_short(seconds / 3600)} hours"
    return f"{_short(seconds / 86_400)} days"


def count(n: int) -> str:
    """Every digit below a million, then 1.2 M, 3.4 billion."""
    if n < 999_500:
        return f"{n:,}"
    if n < 999_500_000:
        return f"{_short(n / 1e6)} M"
    return f"{_short(n / 1e9)} billion"


def rate(per_second: float) -> str:
    """Two digits per second, minute or hour, so that at least one of whatever is counted fits: 9,800/s, 1.9/min."""
    if per_second >= 0.995:
        return f"{_short(per_second)}/s"
    if per_second * 60 >= 0.995:
        return f"{_short(per_second * 60)}/min"
    return f"{_short(per_second * 3600)}/h"


def _short(number: float) -> str:
    """One decimal below 10, whole numbers below 1,000, then two digits that count."""
    if number < 9.95:
        return f"{number:.1f}"
    if number < 999.5:
        return f"{number:.0f}"
    return f"{float(f'{number:.2g}'):,.0f}"
