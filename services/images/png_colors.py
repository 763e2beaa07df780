"""What the chunks of a PNG say about its colours and its transparency, for readers that follow the specification.

Such a reader ignores a chunk in a wrong place, of a wrong length, or that is the second of its kind. Pillow applies
many of them. An uploader could therefore hide a picture from the guard that every viewer shows.

These rules are those of libpng, which browsers use.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from services.core.errors import NotAnImage, TooLarge

_CHUNKS_LIMIT: Final = 1 << 16
"""Encoders write the pixels in chunks of 8 KiB or more, so a PNG of 512 MiB has as many chunks."""
_COLOR_CHUNKS: Final = frozenset({b"iCCP", b"sRGB", b"gAMA", b"cHRM"})
_CHROMATICITIES_BYTES: Final = 32
_MOST_INTENT: Final = 3
_GAMMA_UNITS: Final = 100_000
_GAMMA_RANGE: Final = range(16, 625_000_001)
"""Older versions of libpng ignore other values, newer ones apply them."""
_MOST_UNSIGNED: Final = (1 << 31) - 1
"""The largest number in a PNG."""
_PROFILES_LIMIT: Final = 8
"""A broken profile costs as much to unpack as a valid one, and the next one counts."""
_PROFILE_NAME_LIMIT_BYTES: Final = 79
_PROFILE_HEADER_BYTES: Final = 132
_PROFILE_INTENTS: Final = 0xFFFF
_OTHER_PROFILE_CLASSES: Final = frozenset({b"abst", b"link"})
"""Their profiles do not describe the colours of an image."""
_PROFILE_CONNECTION_SPACES: Final = frozenset({b"XYZ ", b"Lab "})
_GRAY, _RGB, _PALETTE = 0, 2, 3
_COLOR_BIT: Final = 2
"""Of the colour type. Without it, the image is gray."""


@dataclass(frozen=True, slots=True)
class PngColors:
    """A PNG without the chunks that readers ignore, and what its other chunks say."""

    data: bytes
    """The same object if there was nothing to drop."""
    profile: bytes | None
    """The ICC profile."""
    gamma: float | None
    """None if there is no gamma, or if the PNG says that it is sRGB."""


def read_png_colors(data: bytes, profile_limit_bytes: int) -> PngColors:
    """Find the chunks of a PNG that count for colours and transparency, and drop those that do not.

    A profile that is larger than the limit is cut there to one byte more than the limit.

    Raises:
        TooLarge: the PNG has more chunks than any encoder writes, or many broken profiles.
        NotAnImage: viewers differ in what they show of the gamma.
    """
    if data[12:16] != b"IHDR" or len(data) < 33:
        return PngColors(data=data, profile=None, gamma=None)
    depth, color_type = data[24], data[25]
    kept: dict[bytes, bytes] = {}
    dropped: list[tuple[int, int]] = []
    profiles = palette_colors = 0
    has_palette = has_pixels = False
    at = 8
    for _ in range(_CHUNKS_LIMIT):
        length = int.from_bytes(data[at : at + 4])
        chunk = data[at + 4 : at + 8]
        end = at + 12 + length
        if chunk == b"IEND" or end > len(data):
            break
        if chunk == b"IDAT":
            has_pixels = True
        elif chunk == b"PLTE" and not has_pixels and color_type & _COLOR_BIT:
            has_palette = True
            palette_colors = min(length // 3, 1 << min(depth, 8))
        elif chunk in _COLOR_CHUNKS or chunk == b"tRNS":
            content: bytes | None = None
            if chunk not in kept and not has_pixels and (chunk == b"tRNS" or not has_palette):
                profiles += chunk == b"iCCP"
                content = data[at + 8 : end - 4]
                content = (
                    _read_profile(content, color_type, profile_limit_bytes)
                    if chunk == b"iCCP"
                    else _accept(chunk, content, color_type, palette_colors)
                )
            if content is None:
                dropped.append((at, end))
            else:
                kept[chunk] = content
            if profiles > _PROFILES_LIMIT:
                raise TooLarge(f"costs too much: the PNG has more than {_PROFILES_LIMIT} broken colour profiles")
        at = end
    else:
        raise TooLarge(f"costs too much: the PNG has more than {_CHUNKS_LIMIT} chunks")
    return PngColors(
        data=_cut(data, dropped) if dropped else data,
        profile=kept.get(b"iCCP"),
        gamma=None if b"sRGB" in kept or b"gAMA" not in kept else _read_gamma(kept[b"gAMA"]),
    )


def _accept(chunk: bytes, content: bytes, color_type: int, palette_colors: int) -> bytes | None:
    """Return the content of a chunk but iCCP, or None if its length or value is invalid."""
    if chunk == b"tRNS" and color_type == _PALETTE:  # before the PLTE, there are no colours
        valid = 0 < len(content) <= palette_colors
    elif chunk == b"tRNS":
        valid = len(content) == {_GRAY: 2, _RGB: 6}.get(color_type)
    elif chunk == b"sRGB":
        valid = len(content) == 1 and content[0] <= _MOST_INTENT
    elif chunk == b"gAMA":
        valid = len(content) == 4 and 0 < int.from_bytes(content) <= _MOST_UNSIGNED
    else:
        valid = len(content) == _CHROMATICITIES_BYTES
    return content if valid else None


def _read_gamma(content: bytes) -> float:
    units = int.from_bytes(content)
    if units not in _GAMMA_RANGE:
        raise NotAnImage(f"the PNG has a gamma of {units / _GAMMA_UNITS:g}, which viewers show in different ways")
    return units / _GAMMA_UNITS


def _read_profile(content: bytes, color_type: int, limit_bytes: int) -> bytes | None:
    """Return the profile of an iCCP chunk, or None if it is broken or does not fit the PNG.

    The checksum behind the compressed profile does not count: libpng needs the profile only.
    """
    name, separator, rest = content[: _PROFILE_NAME_LIMIT_BYTES + 2].partition(b"\0")
    packed = content[len(name) + 2 :]
    if not separator or not 0 < len(name) <= _PROFILE_NAME_LIMIT_BYTES or rest[:1] != b"\0" or len(packed) < 2:
        return None
    if packed[0] & 15 != 8 or packed[0] >> 4 > 7 or packed[1] & 32 or int.from_bytes(packed[:2]) % 31:
        return None
    inflater = zlib.decompressobj(wbits=-15)
    try:
        header = inflater.decompress(packed[2:], _PROFILE_HEADER_BYTES)
        if len(header) < _PROFILE_HEADER_BYTES or not _is_profile_header(header, color_type):
            return None
        length = int.from_bytes(header[:4])
        rest_bytes = min(length, limit_bytes + 1) - _PROFILE_HEADER_BYTES
        profile = header + (inflater.decompress(inflater.unconsumed_tail, rest_bytes) if rest_bytes else b"")
    except zlib.error:
        return None
    tags_end = _PROFILE_HEADER_BYTES + 12 * int.from_bytes(header[128:132])
    if len(profile) < min(length, limit_bytes + 1) or tags_end > len(profile):
        return None
    tags = struct.iter_unpack(">4sII", profile[_PROFILE_HEADER_BYTES:tags_end])
    return profile if all(offset + size <= length for _, offset, size in tags) else None


def _is_profile_header(header: bytes, color_type: int) -> bool:
    length = int.from_bytes(header[:4])
    return (
        length >= _PROFILE_HEADER_BYTES
        and not (header[8] > 3 and length % 4)
        and header[12:16] not in _OTHER_PROFILE_CLASSES
        and header[16:20] == (b"RGB " if color_type & _COLOR_BIT else b"GRAY")
        and header[20:24] in _PROFILE_CONNECTION_SPACES
        and header[36:40] == b"acsp"
        and int.from_bytes(header[64:68]) < _PROFILE_INTENTS
    )


def _cut(data: bytes, dropped: list[tuple[int, int]]) -> bytes:
    view = memoryview(data)
    starts = [0, *(end for _, end in dropped)]
    ends = [*(start for start, _ in dropped), len(data)]
    return b"".join(view[start:end] for start, end in zip(starts, ends, strict=True))
