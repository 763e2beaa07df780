"""A process that decodes images for `services.images.decoder_pool`, one at a time, over the socket on its stdin.

    python -m services.images.decoder_process IMAGE_PX SIDE_PX MEMORY_BYTES DEADLINE_S

It gives up all rights that it does not need (see `services.images.decoder_sandbox`), and its first frame says which
measures are in force. It ends with its parent: when the socket closes it exits, even during an image. If a decoder
holds the interpreter lock, an alarm of the kernel ends the process soon after the deadline.
"""

import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import warnings
from typing import Any, Final

from PIL import Image

from services.core.errors import DecoderOutOfMemory, NotAnImage, TooLarge
from services.images import decoder_sandbox
from services.images.decode import Limits, downscale, prepare
from services.images.decoder_protocol import Channel, ProtocolError, from_fields, to_fields

_PARENT_CHECK_MS: Final = 1000
_ALARM_SLACK_S: Final = 5
_REQUEST_LIMIT_BYTES: Final = 1 << 32


def answer(request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """The answer to a request: a prepared image, or the reason for a rejection."""
    try:
        if "side_px" in request:
            image = downscale(from_fields(request["image"], data), int(request["side_px"]))
        else:
            image = prepare(data, limits, request["sha256"])
    except (NotAnImage, TooLarge) as error:
        rejection: dict[str, Any] = {"reason": error.reason, "detail": str(error)}
        if isinstance(error, DecoderOutOfMemory):
            rejection["out_of_memory"] = True
        return rejection, b""
    return to_fields(image), image.data


def main(image_px: int, side_px: int, memory_bytes: int, deadline_s: float) -> None:
    """Limit this process, report that it is ready, and answer until the parent closes the socket."""
    connection = socket.socket(fileno=os.dup(0))
    watch = threading.Thread(target=_exit_with_parent, args=(os.getppid(), connection), daemon=True)
    Image.init()  # loads all decoders
    quiet = os.open(os.devnull, os.O_WRONLY)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    measures = decoder_sandbox.enter()
    watch.start()
    Image.MAX_IMAGE_PIXELS = image_px
    warnings.simplefilter("ignore")
    limits = Limits(image_px, side_px)
    channel = Channel(connection)
    channel.send({"ready": True, "measures": measures}, b"")
    os.dup2(quiet, 2)  # native decoders write there about every broken image
    try:
        while True:
            request, data = channel.receive(_REQUEST_LIMIT_BYTES)
            signal.setitimer(
                signal.ITIMER_REAL, deadline_s + _ALARM_SLACK_S
            )  # SIGALRM has no handler, so it kills the process
            _limit_cpu(deadline_s + _ALARM_SLACK_S)
            head, body = answer(request, data, limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.send(head, body)
            del data, body
    except (ProtocolError, OSError):
        os._exit(0)


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end this process after `seconds` more of CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, highest = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if highest < 0 else min(limit, highest), highest))


def _exit_with_parent(parent: int, connection: socket.socket) -> None:
    """End this process, even during a decode, when its parent has ended or has closed the socket."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    while not poll.poll(_PARENT_CHECK_MS) and os.getppid() == parent:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
