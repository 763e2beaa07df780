"""The image with which engines and gateways check that they can judge."""

import io

from PIL import Image


def draw_probe_image() -> bytes:
    """Return a grey gradient of 256 by 256 pixels as a JPEG."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
