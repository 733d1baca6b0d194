"""Units of measurement as CF files write them: enough to see that 0.5 hPa are 50 Pa and that metres are no kelvins."""

from __future__ import annotations

import re

# factor to SI base units, and exponents of (m, kg, s, K, mol, rad); amounts only: 1 degC of difference is 1 K
_BASE: dict[str, tuple[float, tuple[int, ...]]] = {
    "m": (1, (1, 0, 0, 0, 0, 0)), "metre": (1, (1, 0, 0, 0, 0, 0)), "meter": (1, (1, 0, 0, 0, 0, 0)),
    "gpm": (1, (1, 0, 0, 0, 0, 0)), "g": (1e-3, (0, 1, 0, 0, 0, 0)), "gram": (1e-3, (0, 1, 0, 0, 0, 0)),
    "s": (1, (0, 0, 1, 0, 0, 0)), "sec": (1, (0, 0, 1, 0, 0, 0)), "second": (1, (0, 0, 1, 0, 0, 0)),
    "min": (60, (0, 0, 1, 0, 0, 0)), "minute": (60, (0, 0, 1, 0, 0, 0)), "h": (3600, (0, 0, 1, 0, 0, 0)),
    "hr": (3600, (0, 0, 1, 0, 0, 0)), "hour": (3600, (0, 0, 1, 0, 0, 0)), "d": (86400, (0, 0, 1, 0, 0, 0)),
    "day": (86400, (0, 0, 1, 0, 0, 0)), "K": (1, (0, 0, 0, 1, 0, 0)), "kelvin": (1, (0, 0, 0, 1, 0, 0)),
    "degK": (1, (0, 0, 0, 1, 0, 0)), "degC": (1, (0, 0, 0, 1, 0, 0)), "deg_C": (1, (0, 0, 0, 1, 0, 0)),
    "C": (1, (0, 0, 0, 1, 0, 0)), "celsius": (1, (0, 0, 0, 1, 0, 0)), "mol": (1, (0, 0, 0, 0, 1, 0)),
    "rad": (1, (0, 0, 0, 0, 0, 1)), "radian": (1, (0, 0, 0, 0, 0, 1)), "degree": (0.017453292519943295, (0, 0, 0, 0, 0, 1)),
    "deg": (0.017453292519943295, (0, 0, 0, 0, 0, 1)), "Pa": (1, (-1, 1, -2, 0, 0, 0)), "pascal": (1, (-1, 1, -2, 0, 0, 0)),
    "bar": (1e5, (-1, 1, -2, 0, 0, 0)), "millibar": (100, (-1, 1, -2, 0, 0, 0)), "mb": (100, (-1, 1, -2, 0, 0, 0)),
    "N": (1, (1, 1, -2, 0, 0, 0)), "newton": (1, (1, 1, -2, 0, 0, 0)), "J": (1, (2, 1, -2, 0, 0, 0)),
    "joule": (1, (2, 1, -2, 0, 0, 0)), "W": (1, (2, 1, -3, 0, 0, 0)), "watt": (1, (2, 1, -3, 0, 0, 0)),
    "Hz": (1, (0, 0, -1, 0, 0, 0)), "kt": (1852 / 3600, (1, 0, -1, 0, 0, 0)), "knot": (1852 / 3600, (1, 0, -1, 0, 0, 0)),
    "l": (1e-3, (3, 0, 0, 0, 0, 0)), "%": (1e-2, (0,) * 6), "percent": (1e-2, (0,) * 6), "1": (1, (0,) * 6),
    "ppm": (1e-6, (0,) * 6), "ppb": (1e-9, (0,) * 6),
}  # fmt: skip
_PREFIXES = {"da": 10, "n": 1e-9, "u": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1, "h": 1e2, "k": 1e3, "M": 1e6, "G": 1e9}
_FACTOR = re.compile(r"(?P<name>[A-Za-z_%]+|1(?!\d))(?P<power>(?:\*\*|\^)?[+-]?\d+)?")
_DIMENSIONLESS = {"", "1", "~", "-", "(0 - 1)", "(0-1)", "0-1", "fraction", "dimensionless", "proportion"}

Unit = tuple[float, tuple[int, ...]]


def parse(text: str) -> Unit | None:
    """(factor to SI base units, exponents) of a unit such as 'm s**-1', 'm/s', 'kg m-2', 'hPa'; None for what is unknown."""
    text = text.strip().replace("\N{DEGREE SIGN}", "deg").replace("\N{MICRO SIGN}", "u")
    if text in _DIMENSIONLESS:
        return 1.0, (0,) * 6
    factor, powers, at, sign = 1.0, [0] * 6, 0, 1
    while at < len(text):
        found = _FACTOR.match(text, at)
        if not found or (unit := _named(found["name"])) is None:
            return None
        power = sign * int((found["power"] or "1").lstrip("*^"))
        factor *= unit[0] ** power
        powers = [p + q * power for p, q in zip(powers, unit[1])]
        rest = re.compile(r"\s*(/|\*|\.|\N{MIDDLE DOT})?\s*").match(text, found.end())
        at, sign = rest.end(), -1 if rest[1] == "/" else 1
        if at == len(text) and rest[1]:
            return None
    return factor, tuple(powers)


def _named(name: str) -> Unit | None:
    for candidate in (name, name[:-1] if name.endswith("s") and len(name) > 3 else name):  # hours, degrees
        if candidate in _BASE:
            return _BASE[candidate]
    for prefix, factor in _PREFIXES.items():
        if name.startswith(prefix) and name[len(prefix) :] in _BASE:
            base, powers = _BASE[name[len(prefix) :]]
            return base * factor, powers
    return None


def factor(given: str, stored: str) -> float | None:
    """What an amount in ``given`` units is multiplied with to be in ``stored`` ones; None where they measure other things.

    Units that are not known here count only when both are written alike.
    """
    if "".join(given.split()) == "".join(stored.split()):
        return 1.0
    a, b = parse(given), parse(stored)
    if a is None or b is None or a[1] != b[1]:
        return None
    ratio = a[0] / b[0]
    return float(f"{ratio:.15g}")  # 0.1 mm in m is 1e-4, not 1.0000000000000002e-4
