"""The image with which engines and gateways check that they can judge."""

import io

from PIL import Image


def draw_probe_image(width: int = 256, height: int = 256, *, number: int = 0) -> bytes:
    """Return a gradient as a JPEG: a grey one as number 0, and one with another blue for each further number."""
    gradient = Image.linear_gradient("L").resize((width, height))
    blue = Image.new("L", gradient.size, 53 * number % 256) if number else gradient
    buffer = io.BytesIO()
    Image.merge("RGB", (gradient, gradient, blue)).save(buffer, "JPEG")
    return buffer.getvalue()
