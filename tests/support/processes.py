"""Whether processes have ended."""

from collections.abc import Iterable

import psutil


def are_gone(processes: Iterable[psutil.Process | int], within_s: float = 10) -> bool:
    """Wait up to `within_s` seconds until the processes have ended. A zombie has ended."""
    found = []
    for each in processes:
        try:
            found.append(psutil.Process(each) if isinstance(each, int) else each)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(found, timeout=within_s)
    return not any(_is_running(process) for process in alive)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
