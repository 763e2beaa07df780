"""The memory of decoder processes."""

from pathlib import Path

import psutil
import pytest
from PIL import Image

from services.core.errors import TooLarge
from services.images import decoder_pool
from services.images.decoder_limits import decoder_memory_bytes, find_memory_bytes
from services.images.decoder_pool import DecoderPool
from tests.support.images import make_settings
from tests.support.pictures import encoded, picture

GIB = 1 << 30


@pytest.mark.parametrize(
    ("machine", "workers", "limit"),
    [
        (64 * GIB, 2, GIB + 1_600_000_000),
        (4 * GIB, 2, GIB),
        (4 * GIB, 1, 2 * GIB),
        (2 * GIB, 2, GIB // 2),
        (1 * GIB, 8, GIB // 2),
    ],
)
def test_decoders_share_half_of_the_memory(machine: int, workers: int, limit: int) -> None:
    assert decoder_memory_bytes(100_000_000, workers, machine) == limit


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1000\n"}, 1000),
        ("0::/pod/box\n", {"pod/memory.max": "900", "pod/box/memory.max": "max", "memory.max": "2000"}, 900),
        ("0::/of/the/host\n", {"memory.max": "700\n"}, 700),
        ("0::/../other\n", {"memory.max": "700\n"}, 700),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "800"}, 800),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "800"}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_memory_is_the_tightest_limit_of_the_cgroups(
    tmp_path: Path, cgroup: str, files: dict[str, str], limit: int | None
) -> None:
    for name, content in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert find_memory_bytes(tmp_path) == (limit or psutil.virtual_memory().total)


def test_machine_without_cgroups_has_its_own_memory(tmp_path: Path) -> None:
    assert find_memory_bytes(tmp_path) == psutil.virtual_memory().total


async def test_bomb_in_a_small_container_is_too_large_and_photos_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "find_memory_bytes", lambda: 2 * GIB)
    preparer = DecoderPool(make_settings(decode_workers=2), 512)
    bomb = encoded(Image.new("RGB", (9999, 9999)), "webp", lossless=True, method=0, quality=0)
    assert len(bomb) < 20_000  # and two gigabytes in a decoder without a limit
    try:
        with pytest.raises(TooLarge, match="more memory"):
            await preparer.prepare(bomb)
        photo = await preparer.prepare(encoded(picture(6000, 4000), "jpeg"))
        assert photo.facts.width == 6000
        drawing = await preparer.prepare(encoded(picture(4000, 3000), "png"))
        assert drawing.facts.width == 4000
    finally:
        preparer.close()
