"""Decoder processes: crashes, hangs, memory limits, and the death of their parent."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from services.core.errors import NotAnImage, TooLarge, Unavailable
from services.images import decoder_pool
from services.images.decoder_pool import DecoderPool
from services.moderation.retrying_ports import RetryingPreparer
from tests.support.images import make_settings
from tests.support.pictures import difference, encoded, picture, shown
from tests.support.processes import are_gone

ROOT = Path(__file__).parents[2]


def workers_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "services.images.decoder_process" in child.cmdline()
    ]


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder whose `sitecustomize.py` the decoding processes run first: the place for a decoder that misbehaves."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def misbehave(folder: Path, behaviour: str) -> None:
    """Let decoding an image that is marked `BAD!` do something else."""
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys
            if "services.images.decoder_process" in sys.orig_argv:
                from PIL import Image
                original = Image.open
                def open(file, *args, **options):
                    if b"BAD!" in file.getvalue():
                        import ctypes, os, signal, time
                        BEHAVIOUR
                    return original(file, *args, **options)
                Image.open = open
            """
        ).replace("BEHAVIOUR", behaviour)
    )


GOOD = encoded(picture(), "png")
BAD = GOOD + b"BAD!"


async def test_image_is_prepared_and_downscaled_for_the_first_look() -> None:
    preparer = DecoderPool(make_settings(), 1000)
    try:
        prepared = await preparer.prepare(encoded(picture(1800, 1200), "webp"))
        assert (prepared.width, prepared.height, prepared.facts.width) == (1000, 667, 1800)
        assert difference(shown(prepared), picture(1000, 667)) < 3
        look = await preparer.prepare_first_look(prepared)
        assert (look.width, look.height) == (384, 256)
        assert look.sha256 == prepared.sha256
        assert difference(shown(look), picture(384, 256)) < 3
        with pytest.raises(NotAnImage):
            await preparer.prepare(b"no image")
    finally:
        preparer.close()


async def test_many_images_use_a_bounded_number_of_processes() -> None:
    preparer = DecoderPool(make_settings(), 512)
    try:
        images = [encoded(picture(64 + n, 64), "png") for n in range(40)]
        prepared = await asyncio.gather(*map(preparer.prepare, images))
        assert [image.width for image in prepared] == [64 + n for n in range(40)]
        assert len(workers_of(os.getpid())) <= 2
    finally:
        preparer.close()


@pytest.mark.parametrize("behaviour", ["os.kill(os.getpid(), signal.SIGSEGV)", "os.abort()", "os._exit(3)"])
async def test_decoder_crash_fails_only_its_image(decoders: Path, behaviour: str) -> None:
    misbehave(decoders, behaviour)
    preparer = DecoderPool(make_settings(), 512)
    try:
        results = await asyncio.gather(
            *(preparer.prepare(BAD if n % 3 == 0 else GOOD) for n in range(9)), return_exceptions=True
        )
        for n, result in enumerate(results):
            if n % 3 == 0:
                assert isinstance(result, NotAnImage)
                assert "crashed" in str(result)
            else:
                assert not isinstance(result, BaseException)
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


@pytest.mark.parametrize(
    "behaviour",
    [
        "time.sleep(60)",
        "ctypes.PyDLL(None).sleep(60)",  # holds the interpreter's lock, as some decoders do
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    ],
)
async def test_hanging_decoder_is_killed_at_the_deadline(decoders: Path, behaviour: str) -> None:
    misbehave(decoders, behaviour)
    preparer = DecoderPool(make_settings(decode_deadline_s=1, decode_workers=1), 512)
    try:
        await preparer.prepare(GOOD)
        with pytest.raises(NotAnImage, match="longer than 1 s"):
            await asyncio.wait_for(preparer.prepare(BAD), 30)  # half of what the decoder would take
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


def forge(folder: Path, answer: str) -> None:
    """Let the decoder of an image that is marked `BAD!` answer this; `honest` is what it would say."""
    misbehave(
        folder,
        "main = sys.modules['__main__']; real = main.to_fields; "
        f"main.to_fields = lambda image: (lambda honest: {answer})(real(image))",
    )


FORGED = {
    "width": ["float('inf')", "float('nan')", "0", "-1", "True", "'64'", "64.5", "513", "10 ** 4000", "None"],
    "sha256": ["'\\ud800'", "'\\x1b[2J'", "'0' * 64", "'A' * 64", "honest['sha256'] + '\\\\n'", "None", "[]"],
    "media_type": ["'image/png'", "'text/html'", "[]", "None"],
    "facts": [
        "None",
        "{**honest['facts'], 'format': '\\x1b]0;x\\x07'}",
        "{**honest['facts'], 'format': '\\ud800'}",
        "{**honest['facts'], 'format': {}}",
        "{**honest['facts'], 'width': 10 ** 4000}",
        "{**honest['facts'], 'width': 1 << 30}",
        "{**honest['facts'], 'height': float('inf')}",
        "{**honest['facts'], 'frames': 0}",
        "{**honest['facts'], 'frames': 1 << 40}",
    ],
}
"""What a taken decoder may claim, as expressions, by the field of its answer."""


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FORGED.items() for value in values])
async def test_forged_answer_is_a_crash_and_its_decoder_is_replaced(
    decoders: Path, field: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    forge(decoders, "{**honest, %r: %s}" % (field, value))  # noqa: UP031 - braces
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(NotAnImage, match="crashed 2 times"):
            await preparer.prepare(BAD)
        assert "may have been taken over" in caplog.text
        assert workers_of(os.getpid()) == []
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


@pytest.mark.parametrize(
    "answer",
    [
        "{**honest, 'facts': {**honest['facts'], 'format': 'gif'}}",
        "{**honest, 'sha256': '0' * 64}",
        "{**honest, 'width': 33}",
    ],
)
async def test_forged_answer_about_a_prepared_image_is_a_crash(decoders: Path, answer: str) -> None:
    forge(decoders, answer)
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        image = replace(await preparer.prepare(GOOD), data=BAD)
        with pytest.raises(NotAnImage, match="crashed 2 times"):
            await preparer.downscale(image, 32)
        assert workers_of(os.getpid()) == []
    finally:
        preparer.close()


async def test_text_of_a_rejection_is_bounded_and_has_no_control_characters(decoders: Path) -> None:
    forge(decoders, "{'reason': 'not_an_image', 'detail': 'is \\x1b]0;x\\x07\\r\\n\\ud800\\u202e' + 'A' * 60000}")
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(NotAnImage) as caught:
            await preparer.prepare(BAD)
        assert str(caught.value).startswith("is ?]0;x?????AAAA")
        assert len(str(caught.value)) <= 500
    finally:
        preparer.close()


async def test_any_failure_with_an_answer_replaces_the_decoder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("of an answer that nobody has thought of")

    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(decoder_pool, "from_fields", fail)
            for _ in range(3):
                with pytest.raises(NotAnImage, match="crashed 2 times"):
                    await preparer.prepare(GOOD)
                assert workers_of(os.getpid()) == []
        assert "of an answer that nobody has thought of" in caplog.text
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


async def test_decoder_over_the_memory_limit_is_too_large(decoders: Path) -> None:
    misbehave(decoders, "hoard = [bytearray(1 << 28) for _ in range(100)]")
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(TooLarge):
            await preparer.prepare(BAD)
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


async def test_memory_left_by_earlier_images_makes_no_image_too_large(decoders: Path) -> None:
    """An image of somebody else must not take the memory of later ones. Here the first image leaves memory behind."""
    misbehave(decoders, "sys.hoard = getattr(sys, 'hoard', []) + [bytearray(700 << 20)]")
    preparer = DecoderPool(make_settings(decode_workers=1, image_limit_px=1_000_000), 512)
    try:
        for _ in range(4):  # two of them do not fit into one process
            assert (await preparer.prepare(BAD)).width == picture().width
    finally:
        preparer.close()


async def test_image_that_needs_too_much_memory_is_too_large_in_used_decoders_too(decoders: Path) -> None:
    misbehave(decoders, "hoard = [bytearray(1 << 28) for _ in range(100)]")
    preparer = DecoderPool(make_settings(decode_workers=2), 512)
    try:
        for _ in range(2):
            await asyncio.gather(*(preparer.prepare(GOOD) for _ in range(8)))
            with pytest.raises(TooLarge, match="memory"):
                await preparer.prepare(BAD)
    finally:
        preparer.close()


async def test_decoder_killed_from_outside_is_unavailable(decoders: Path) -> None:
    misbehave(decoders, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    preparer = DecoderPool(make_settings(), 512)
    try:
        with pytest.raises(Unavailable):
            await preparer.prepare(BAD)
        for worker in workers_of(os.getpid()):
            worker.kill()
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


async def test_image_whose_decoder_is_killed_three_times_is_too_large(decoders: Path) -> None:
    misbehave(decoders, "os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    preparer = DecoderPool(make_settings(), 512)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="SIGKILL"):
                await preparer.prepare(BAD)
            assert (await preparer.prepare(GOOD)).data == GOOD
        with pytest.raises(Unavailable, match="1 of 3"):
            await preparer.prepare(BAD + b"another image")
        with pytest.raises(TooLarge, match="killed 3 times"):
            await preparer.prepare(BAD)
    finally:
        preparer.close()


async def test_image_that_kills_decoders_ends_with_the_retrying_port(decoders: Path) -> None:
    """As on the stream, where a submission is retried while a backend is unavailable."""
    misbehave(decoders, "os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    preparer = DecoderPool(make_settings(), 512)
    try:
        with pytest.raises(TooLarge, match="killed 3 times"):
            await asyncio.wait_for(RetryingPreparer(preparer).prepare(BAD), 60)
    finally:
        preparer.close()


async def test_decoded_image_has_no_kills_left(decoders: Path, tmp_path: Path) -> None:
    """An image beside a hostile one is killed now and then; between two kills it is decoded."""
    flag = tmp_path / "flag"
    misbehave(decoders, f"if os.path.exists({str(flag)!r}): os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    preparer = DecoderPool(make_settings(), 512)
    try:
        for _ in range(4):
            flag.touch()
            with pytest.raises(Unavailable, match="1 of 3"):
                await preparer.prepare(BAD)
            flag.unlink()
            assert (await preparer.prepare(BAD)).data
    finally:
        preparer.close()


async def test_close_fails_running_images_and_leaves_no_process(decoders: Path) -> None:
    misbehave(decoders, "time.sleep(60)")
    preparer = DecoderPool(make_settings(), 512)
    running = [asyncio.create_task(preparer.prepare(BAD)) for _ in range(6)]
    async with asyncio.timeout(30):
        while len(workers := workers_of(os.getpid())) < 2:  # noqa: ASYNC110 - the pool tells nobody of a start
            await asyncio.sleep(0.05)
    assert len(workers) == 2
    preparer.close()
    preparer.close()
    results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 30)
    assert [type(result) for result in results] == [Unavailable] * 6
    assert are_gone(workers, within_s=5)
    with pytest.raises(Unavailable):
        await preparer.prepare(GOOD)


async def test_decoder_that_does_not_start_is_unavailable(decoders: Path) -> None:
    (decoders / "sitecustomize.py").write_text(
        "import sys, os\nif 'services.images.decoder_process' in sys.orig_argv: os._exit(9)\n"
    )
    preparer = DecoderPool(make_settings(), 512)
    try:
        with pytest.raises(Unavailable, match="did not start"):
            await preparer.prepare(GOOD)
    finally:
        preparer.close()


async def test_event_loop_runs_during_decoding() -> None:
    preparer = DecoderPool(make_settings(), 512)
    try:
        large = encoded(picture(6000, 5000), "png")
        task = asyncio.create_task(preparer.prepare(large))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert turns > 5, "the event loop waited for the decoder"
        await task
    finally:
        preparer.close()


async def test_decoders_see_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("REDIS_PASSWORD", "RAY_AUTH_TOKEN", "HF_TOKEN", "HTTPS_PROXY", "A_NAME_OF_TOMORROW"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("SLUICE_REDIS_URL", "redis://:secret@host")
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        await preparer.prepare(GOOD)
        (worker,) = workers_of(os.getpid())
        assert not [name for name, value in worker.environ().items() if "secret" in value]
        libraries = {Path(mapping.path).name for mapping in worker.memory_maps()}
        assert not [name for name in libraries if name.startswith(("libtorch", "_raylet"))]
    finally:
        preparer.close()


PARENT = """
import asyncio, sys, time
import tests.images.test_decoder_pool as test
from services.images.decoder_pool import DecoderPool

async def main():
    preparer = DecoderPool(test.make_settings(decode_deadline_s=20), 512)
    await asyncio.gather(preparer.prepare(test.GOOD), preparer.prepare(test.GOOD))
    busy = asyncio.create_task(preparer.prepare(test.BAD)) if sys.argv[1] == "busy" else None
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_decoders_end_when_their_parent_is_killed(decoders: Path, state: str) -> None:
    misbehave(decoders, "time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(decoders), str(ROOT)])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], env=environment, stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"ready\n"
        workers = workers_of(parent.pid)
        assert workers
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert are_gone(workers, within_s=5)


def test_alarm_ends_a_decoder_that_holds_the_interpreter_lock(decoders: Path) -> None:
    misbehave(decoders, "ctypes.PyDLL(None).sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(decoders), str(ROOT)])}
    source = PARENT.replace("decode_deadline_s=20", "decode_deadline_s=2")
    parent = subprocess.Popen([sys.executable, "-c", source, "busy"], env=environment, stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"ready\n"
        workers = workers_of(parent.pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert are_gone(workers, within_s=12)


def test_pool_works_in_a_thread_and_does_not_run_main_again(tmp_path: Path) -> None:
    """As in a Ray Serve replica, whose `__main__` is Ray's own program."""
    program = tmp_path / "default_worker.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import asyncio, sys, threading
            sys.path.insert(0, {str(ROOT)!r})
            print("started", flush=True)
            import tests.images.test_decoder_pool as test
            from services.images.decoder_pool import DecoderPool

            async def main():
                preparer = DecoderPool(test.make_settings(), 512)
                print((await preparer.prepare(test.GOOD)).width, flush=True)
                preparer.close()

            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            thread.join()
            """
        )
    )
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, timeout=60, check=True, cwd=tmp_path, text=True
    )
    assert result.stdout.split() == ["started", "96"]
