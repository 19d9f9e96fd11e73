"""Runs a function in several processes that form a gloo group, and brings their results back."""

import io
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist

CONTEXT = mp.get_context("forkserver")  # imports torch once, in a process that has started no thread
CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.fsdp", "fuseopt"])


def _work(function: Callable, rank: int, world: int, meeting: str, results, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(meeting, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        file = io.BytesIO()
        torch.save(result, file)
        results.put((rank, file.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way


def _next(results, workers: list, end: float) -> tuple:
    """The next result. Raises AssertionError once none can come."""
    while True:
        alive = all(worker.exitcode in (None, 0) for worker in workers) and time.monotonic() < end
        try:
            return results.get(timeout=1)
        except Empty:
            assert alive, f"a process died or did not come back; exit codes {[w.exitcode for w in workers]}"


def on_ranks(world: int, function: Callable, *args) -> list:
    """[function(*args) of every rank]. Raises AssertionError with the traceback of the first that failed."""
    results = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        workers = [
            CONTEXT.Process(target=_work, args=(function, rank, world, meeting, results, args), daemon=True)
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        try:
            found, end = {}, time.monotonic() + 180
            while len(found) < world:
                rank, result, error = _next(results, workers, end)
                assert error is None, f"rank {rank} of {world}:\n{error}"
                found[rank] = torch.load(io.BytesIO(result), weights_only=False)  # what our own function returned
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
    return [found[rank] for rank in range(world)]
