"""What the HTML pages share: their template's settings, pictures inside the page, and how numbers are written."""

import base64
import datetime
import io
import math
from typing import Any

import jinja2


def environment() -> jinja2.Environment:
    """Returns jinja2 with this package's templates: what is filled in is escaped, what is missing an error."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("unclip_jax"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"duration": duration, "percent": percent, "utc": utc, "number": number}
    return found


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Returns a picture as a URL that holds it."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def svg(figure: Any) -> str:
    """Returns a matplotlib figure as the URL of an SVG whose words are the viewer's own fonts."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return data_url(buffer.getvalue(), "image/svg+xml")


def duration(seconds: float) -> str:
    """Returns seconds as people write them: 3.2 s, 48 s, 3 min 20 s, 5 h 02 min, 3 d 04 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours < 3:
        return f"{minutes} min {int(seconds) % 60:02d} s"
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def percent(share: float) -> str:
    """Returns a share as a percentage."""
    return f"{100 * share:.0f}%"


def utc(seconds: float) -> str:
    """Returns Unix time as a date and a time."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: float) -> str:
    """Returns a number in few digits: 12,345, 0.0123, 4.5e-06."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
