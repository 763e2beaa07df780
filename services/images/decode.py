"""Decodes an image of any of eight formats to an upright RGB picture that is no larger than the model can use.

Pure functions. The bytes are hostile: outside of tests these functions run in a process of
`services.images.decoder_pool`, where a crash, a hang or a flood of memory fails only one image.

An image that is not passed on unchanged becomes a JPEG of quality 95 without chroma subsampling. Compared with the
model's own downscaling its loss is negligible. A PNG would take ten times as long, and a photo several times the bytes.
"""

import hashlib
import io
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import pillow_heif
from PIL import AvifImagePlugin, Image, ImageCms, TiffImagePlugin, WebPImagePlugin

from services.core.errors import DecoderOutOfMemory, NotAnImage, TooLarge, Unjudgeable
from services.core.values import ImageFacts, PreparedImage
from services.images.decoding_cost import check_gif_head, check_jpeg_head, limit_directories
from services.images.image_format import (
    Format,
    count_gif_frames,
    count_jpeg_scans,
    count_tiff_pages,
    detect_format,
    is_plain,
    read_webp_size,
)
from services.images.png_colors import read_png_colors

_PLUGINS: Final[dict[Format, str]] = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": WebPImagePlugin.WebPImageFile.format,
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": TiffImagePlugin.TiffImageFile.format,
    "avif": AvifImagePlugin.AvifImageFile.format,
    "heic": "HEIF",
}
_ORIENTATION_TAG: Final = 0x0112
_TRANSPOSE_BY_ORIENTATION: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: the operation that makes the image upright."""
_JPEG_QUALITY: Final = 95
_REDUCING_GAP: Final = 2.0
"""Pillow's `reducing_gap`: a fast box filter may reduce to this many times the final size; Lanczos does the rest."""
_PASSED_ON_LIMIT_BYTES: Final = 4 << 20
"""A larger image is encoded again: as a JPEG of quality 95 it has fewer bytes."""
_PROFILE_LIMIT_BYTES: Final = 4 << 20
_JPEG_PROFILE_LABEL: Final = b"ICC_PROFILE\0"
_GRAY_MODES: Final = frozenset({"1", "L", "LA", "La"})
_WEBP_BYTES_PER_PX: Final = 20
"""The peak of libwebp's and Pillow's memory while a WebP is decoded."""
_SCANS_ALWAYS_ALLOWED: Final = 16
"""A usual progressive JPEG has 10 scans. The pixel limit bounds the cost of this many."""
_SCANNED_BLOCKS_LIMIT: Final = 25_000_000
"""Scans times blocks of 8 x 8 pixels of a JPEG. A scan costs 10 to 50 ns per block, even if it has no data."""
_SCAN_MIN_BYTES: Final = 4
"""A scan has at least its marker and the length of its header."""
_SRGB_GAMMA: Final = 1 / 2.2

pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
limit_directories()
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the pool of processes uses the cores


@dataclass(frozen=True, slots=True)
class Limits:
    """Pixel limits of an image and of the prepared image."""

    image_px: int
    """Width times height, checked before the decode."""
    side_px: int
    """The longest side of a prepared image."""


def prepare(data: bytes, limits: Limits, sha256: str | None = None) -> PreparedImage:
    """Decode the first frame or page completely; make it upright, opaque (over white), 8-bit sRGB and small enough.

    A plain (see `is_plain`) upright RGB JPEG or PNG that fits is returned unchanged. `sha256`: the digest of `data` in
    hex, if the caller knows it.

    Raises:
        NotAnImage: an unknown format, truncated or corrupt.
        TooLarge: the image has too many pixels, scans, chunks or pieces of metadata, a huge colour profile, or needs
            too much memory.
    """
    kind = detect_format(data)
    if kind is None:
        raise NotAnImage("the bytes are not JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC")
    try:
        return _prepare(data, kind, limits, sha256)
    except Unjudgeable:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecoderOutOfMemory(f"the {kind} needs more memory to decode than allowed") from None
    except Exception as error:  # noqa: BLE001 - on hostile bytes decoders raise any error
        if "too large" in str(error).lower() or "memory" in str(error).lower():
            raise DecoderOutOfMemory(f"the {kind} needs more memory to decode than allowed") from None
        raise NotAnImage(f"the {kind} cannot be decoded: {' '.join(str(error).split())[:200]}") from None


def downscale(image: PreparedImage, side_px: int) -> PreparedImage:
    """The prepared image with its longer side at most `side_px`; the same object if it already fits."""
    if max(image.width, image.height) <= side_px:
        return image
    size = _fit(image.width, image.height, side_px)
    with Image.open(io.BytesIO(image.data), formats=["JPEG", "PNG"]) as opened:
        opened.draft("RGB", _with_gap(size))
        small = _encode(_resize(opened.convert("RGB"), size))
    return replace(image, data=small, media_type="image/jpeg", width=size[0], height=size[1])


def _prepare(data: bytes, kind: Format, limits: Limits, sha256: str | None) -> PreparedImage:
    if kind == "webp":
        size = read_webp_size(data) or (0, 0)
        _check_pixels(size, limits)
        # libwebp reports a lack of memory as a broken file. This only reserves addresses, and raises MemoryError.
        bytearray(_WEBP_BYTES_PER_PX * size[0] * size[1])
    if kind == "jpeg":
        check_jpeg_head(data)
    elif kind == "gif":
        check_gif_head(data)
    colors = read_png_colors(data, _PROFILE_LIMIT_BYTES) if kind == "png" else None
    with Image.open(io.BytesIO(colors.data if colors else data), formats=[_PLUGINS[kind]]) as image:
        width, height = image.size
        _check_pixels(image.size, limits)
        if kind == "jpeg":
            _check_scans(data, image.size)
            image.draft(None, _with_gap(_fit(width, height, limits.side_px)))
        image.load()
        orientation = _read_orientation(image)
        if colors:
            _set_transparent_color(image, data[24])
            profile, gamma = colors.profile, colors.gamma
        else:
            profile = _join_jpeg_profile(image) if kind == "jpeg" else image.info.get("icc_profile")
            gamma = None
        if profile and len(profile) > _PROFILE_LIMIT_BYTES:
            raise TooLarge(f"the colour profile of the {kind} has more than {_PROFILE_LIMIT_BYTES} bytes")
        unchanged = (
            image.mode == "RGB"
            and max(width, height) <= limits.side_px
            and orientation not in _TRANSPOSE_BY_ORIENTATION
            and len(data) <= _PASSED_ON_LIMIT_BYTES
            and is_plain(data, kind)
        )
        upright = (height, width) if orientation >= 5 else (width, height)
        prepared = (
            data
            if unchanged
            else _encode(_make_upright(image, orientation, profile, gamma, _fit(*upright, limits.side_px)))
        )
        frames = _count_frames(image, data, kind)
    size = upright if unchanged else _fit(*upright, limits.side_px)
    return PreparedImage(
        data=prepared,
        media_type="image/png" if unchanged and kind == "png" else "image/jpeg",
        width=size[0],
        height=size[1],
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        facts=ImageFacts(width=upright[0], height=upright[1], format=kind, frames=frames),
    )


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.image_px:
        raise TooLarge(f"the image has {width} x {height} pixels; the limit is {limits.image_px} pixels")


def _check_scans(data: bytes, size: tuple[int, int]) -> None:
    blocks = math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    if len(data) // _SCAN_MIN_BYTES * blocks <= _SCANNED_BLOCKS_LIMIT:
        return  # most images: the scans need not be counted
    scans = count_jpeg_scans(data)
    if scans > _SCANS_ALWAYS_ALLOWED and scans * blocks > _SCANNED_BLOCKS_LIMIT:
        raise TooLarge(
            f"costs too much: the JPEG has {scans} scans of {blocks} blocks; "
            f"the limit is {_SCANNED_BLOCKS_LIMIT} blocks in all scans"
        )


def _fit(width: int, height: int, side_px: int) -> tuple[int, int]:
    longer = max(width, height)
    if longer <= side_px:
        return width, height
    return max(1, round(width * side_px / longer)), max(1, round(height * side_px / longer))


def _with_gap(size: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(size[0] * _REDUCING_GAP), math.ceil(size[1] * _REDUCING_GAP)


def _count_frames(image: Image.Image, data: bytes, kind: Format) -> int:
    if kind == "gif":
        return max(1, count_gif_frames(data))
    if kind == "tiff":
        return max(1, count_tiff_pages(data))
    return max(1, getattr(image, "n_frames", 1))


def _read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Broken EXIF is ignored, as in every viewer."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except TooLarge:
        raise
    except Exception:  # noqa: BLE001 - on hostile bytes the parser raises any error
        return 1
    return orientation if orientation in _TRANSPOSE_BY_ORIENTATION else 1


def _join_jpeg_profile(image: Image.Image) -> bytes | None:
    """Return the ICC profile if its segments are numbered 1 to n of n. As in viewers, no other profile counts.

    Pillow applies profiles of other numbers, and ignores segments behind the header of the frame.
    """
    segments = [
        segment
        for name, segment in getattr(image, "applist", [])
        if name == "APP2" and segment.startswith(_JPEG_PROFILE_LABEL) and len(segment) >= len(_JPEG_PROFILE_LABEL) + 2
    ]
    parts = {segment[12]: segment[14:] for segment in segments}
    numbered = sorted(segment[12] for segment in segments) == list(range(1, len(segments) + 1))
    if not numbered or any(segment[13] != len(segments) for segment in segments):
        return None
    return b"".join(parts[number] for number in sorted(parts)) or None


def _set_transparent_color(image: Image.Image, depth: int) -> None:
    """Make the transparent colour of a PNG the one that viewers take: of the bits of a level, scaled as levels are."""
    color = image.info.get("transparency")
    top = (1 << depth) - 1
    if isinstance(color, tuple):
        if depth > 8:  # Pillow has dropped the lower bits of the pixels
            raise NotAnImage("a PNG of 16 bits per colour that has a transparent colour is not supported")
        image.info["transparency"] = tuple(level & top for level in color)
    elif isinstance(color, int) and image.mode != "P":
        if image.mode == "1":
            image.info["transparency"] = 255 if color else 0
        else:
            image.info["transparency"] = color & top if depth > 8 else (color & top) * 255 // top


def _make_upright(
    image: Image.Image, orientation: int, profile: bytes | None, gamma: float | None, size: tuple[int, int]
) -> Image.Image:
    """The image in 8-bit sRGB, opaque, upright, of `size` (which is given upright).

    Viewers apply a gamma only if there is no profile that can be applied, and the profile before the transparency.
    """
    picture = _reduce_to_eight_bits(image)
    if picture.mode == "RGBA" and (image.mode in _GRAY_MODES or image.mode.startswith("I;16")):
        transform = _build_transform(profile, "RGBA") or _build_transform(profile, "L")
    else:
        transform = _build_transform(profile, picture.mode)
    if gamma is not None and transform is None and abs(gamma - _SRGB_GAMMA) >= 0.01:
        picture = _apply_gamma(picture, gamma)
    picture = _resize(picture, size[::-1] if orientation >= 5 else size)
    picture = _convert_to_srgb(picture, transform)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return (
        picture.transpose(_TRANSPOSE_BY_ORIENTATION[orientation])
        if orientation in _TRANSPOSE_BY_ORIENTATION
        else picture
    )


def _reduce_to_eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L, RGB, RGBA, CMYK or LAB. Levels of more bits are scaled, not clipped."""
    if image.mode.startswith("I;16"):
        wide = image.convert("I")
        gray = _scale_levels(wide, 1 / 257)
        transparent = image.info.get("transparency")
        if not isinstance(transparent, int):
            return gray
        result = gray.convert("RGBA")
        result.putalpha(wide.point([255 * (level != transparent) for level in range(1 << 16)], "L"))
        return result
    if image.mode in ("I", "F"):
        return _scale_levels(image, None)
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _scale_levels(image: Image.Image, scale: float | None) -> Image.Image:
    """Convert mode I or F to L.

    Without `scale`, levels are scaled from the smallest of 0..1, 0..255 and 0..65535 that fits, else from their range.
    """
    offset = 0.0
    if scale is None:
        low, high = image.getextrema()
        if not (isinstance(low, int | float) and isinstance(high, int | float)) or not math.isfinite(high - low):
            raise NotAnImage("the image has levels that are not finite")
        usual = [top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top and (top > 1 or image.mode == "F")]
        scale = 255 / usual[0] if usual else 255 / (high - low or 1)
        offset = 0.0 if usual else -low * scale
    # Pillow does this only in the image's own mode, and only with linear functions.
    return image.convert("F").point(lambda level: level * scale + offset).convert("L")


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    if image.mode == "RGBA":  # transparent pixels must not bleed their colour; Pillow's own conversion ignores the gap
        return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP).convert("RGBA")
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


def _apply_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """The image as browsers show a PNG of this gamma. By an unusual gamma, an attacker can hide a second picture."""
    curve = [round(255 * (level / 255) ** (_SRGB_GAMMA / gamma)) for level in range(256)]
    identity = list(range(256))
    return image.point(curve * 3 + identity if image.mode == "RGBA" else curve * len(image.getbands()))


def _build_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB. As in viewers, a profile that is broken or does not fit the mode is ignored."""
    if mode != "LAB" and not profile:
        return None
    srgb = ImageCms.createProfile("sRGB")
    if mode == "LAB":
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, mode, "RGB")
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        return ImageCms.buildTransform(source, srgb, mode, "RGBA" if mode == "RGBA" else "RGB")
    return None


def _convert_to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """The image in sRGB, of mode RGB or RGBA."""
    if transform is None:
        return image if image.mode == "RGBA" else image.convert("RGB")
    if transform.input_mode == "L" and image.mode == "RGBA":
        converted = transform.apply(image.convert("L"))
        converted.putalpha(image.getchannel("A"))
        return converted
    return transform.apply(image)


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, comment=b"")
    return buffer.getvalue()
