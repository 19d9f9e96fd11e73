"""The bandwidth of a device's memory, measured, and the size of the cache that may take its place."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

LEAST = 2**26  # bytes of the buffer
TIMES = 4  # times the cache, as far as it is known
MOST = 2**30
ROUNDS = 5  # of which the fastest counts: what disturbs only slows down


def of(device: torch.device) -> float | None:
    """Bytes a second, read plus written, of x *= 1 over a buffer beyond the cache; measured once in a process.

    In place, as a step is: what is written was read, so that no memory is fetched only to be overwritten. On the
    CPU with as many threads as torch uses now. None where such a buffer cannot be had.
    """
    if device.type == "meta":
        return None
    try:
        return _measured(device, torch.get_num_threads() if device.type == "cpu" else 0)
    except RuntimeError:  # torch's for memory that is full, on the CPU too
        return None


@lru_cache
def _measured(device: torch.device, threads: int) -> float:
    buffer = min(max(LEAST, TIMES * (cache(device) or 0)), MOST)
    x = torch.ones(buffer // 4, device=device)
    wait = waiter(device)
    seconds = []
    for _ in range(1 + ROUNDS):  # the first also touches the memory, and wakes the threads
        wait()
        start = time.perf_counter()
        x.mul_(1.0)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() * x.element_size() / min(seconds[1:])


def waiter(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has done what it was given."""
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    return (lambda: None) if device.type == "cpu" or synchronize is None else (lambda: synchronize(device))


@lru_cache
def cache(device: torch.device) -> int | None:
    """Bytes of the device's last cache: of all together that the process's processors have; None if not known."""
    if device.type == "cpu":
        return _processors_cache()
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None) or None
    return None


def _processors_cache() -> int | None:
    root, found = Path("/sys/devices/system/cpu"), {}
    try:
        for number in os.sched_getaffinity(0):
            last = max((root / f"cpu{number}" / "cache").glob("index*"), key=lambda index: int(_read(index / "level")))
            found[_read(last / "shared_cpu_list")] = int(_read(last / "size").removesuffix("K")) * 1024
    except (AttributeError, OSError, ValueError):  # not Linux, or a container that hides it
        return None
    return sum(found.values()) or None


def _read(path: Path) -> str:
    return path.read_text().strip()
