"""Numbers of a plan in words: few digits, natural units."""


def plain(value: float) -> str:
    """Three digits, or all of a larger number: 0.75, 81.4, 3,413."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def roughly(seconds: float) -> str:
    """A duration in its natural unit."""
    if seconds < 1:
        return "less than a second"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} seconds"


def span(values: list[float]) -> str:
    """Sorted values as one number or as a range."""
    if not values:
        return "-"
    low, high = short(values[0]), short(values[-1])
    return low if low == high else f"{low} to {high}"


def short(value: float) -> str:
    """As `number`, in at most six characters below 1,000: 456, 0.0117, 0.0023, < 1e-3."""
    return number(value) if value >= 0.01 or not value else f"{value:.2g}" if value >= 1e-3 else "< 1e-3"


def number(value: float) -> str:
    """Three digits: 0.0117, 456, 91,400."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"


def gflop(flops: float) -> str:
    """Four digits, or all of a larger number: 289, 0.06405, 16,864."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e13 else f"{flops / 1e9:,.4g}"


def count(value: float) -> str:
    """605.7 M, 1.3 G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.1f} {letter}"
    return f"{value:g}"


def in_bytes(value: float) -> str:
    """13.3 GB, 362 kB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"


def binary(value: float) -> str:
    """375 MiB, 34.5 KiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"
