"""A bar chart, as SVG."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MINE", "THEIRS", "THEIRS_TOO", "Bar", "bars"]

MINE, THEIRS, THEIRS_TOO = "#1a7f5a", "#8a8f98", "#b9bec6"


@dataclass(frozen=True)
class Bar:
    """One line.

    Attributes:
        name, on: Its label, the second in grey.
        value: Microseconds.
        colour: As in CSS.
    """

    name: str
    on: str
    value: float
    colour: str


def bars(title: str, groups: dict[str, list[Bar]]) -> str:
    """Draw groups of bars, all to one scale, each under its heading."""
    scale = 330 / max(bar.value for group in groups.values() for bar in group)
    parts: list[str] = []
    y = 52
    for heading, group in groups.items():
        parts.append(f'<text x="20" y="{y}" font-weight="600">{heading}</text>')
        for bar in group:
            y += 26
            width = max(1.5, bar.value * scale)
            parts.append(
                f'<text x="210" y="{y}" text-anchor="end">{bar.name}'
                f'<tspan fill="#777"> {bar.on}</tspan></text>'
                f'<rect x="220" y="{y - 13}" width="{width:.1f}" height="17" rx="2"'
                f' fill="{bar.colour}"/>'
                f'<text x="{228 + width:.1f}" y="{y}">{bar.value:.2g} µs</text>'
            )
        y += 42
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y - 20}"'
        f' viewBox="0 0 640 {y - 20}" font-family="system-ui, sans-serif"'
        ' font-size="13" fill="#222">\n<title>CPU time of a delivered event</title>\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="20" y="26" font-size="15" font-weight="600">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
