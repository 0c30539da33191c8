"""Batches read ahead by other processes, so that a step does not wait for the disk."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from credit.data.sampler import Draw
from credit.errors import DataError
from credit.stop import SIGNALS


class BatchLoader(DataLoader[Any]):
    """The batches of a data set that reads them whole, the same and in the same order for any number of workers.

    Workers are forked from a clean server process that has imported what they need and nothing else: no MPI, no GPU,
    no open store and no threads of this rank are in them. They stay from one pass to the next, and end with the rank,
    however it ends.

    Args:
        dataset: has `__getitems__(draws)`, which gives a batch; pickled once a worker.
        sampler: gives the draws of each batch; it stays in this process.
        workers: processes that read; 0 reads here.
        prefetch: batches that each of them reads ahead.
        pin: copy batches into pinned memory, from where a GPU takes them without waiting.

    Raises:
        Exception: while iterating, what reading raised; DataError if a worker has died.
    """

    def __init__(
        self, dataset: Dataset[Any], sampler: Sampler[list[Draw]], workers: int, prefetch: int, pin: bool
    ) -> None:
        ahead: dict[str, Any] = {}
        if workers:
            ahead = {"multiprocessing_context": _server(), "prefetch_factor": prefetch, "persistent_workers": True}
            ahead |= {"worker_init_fn": _stay_with_rank, "num_workers": workers}
        super().__init__(
            _Reporting(dataset) if workers else dataset,
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            pin_memory=pin,
            **ahead,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not self.num_workers:
                    raise
                raise DataError(
                    f"{error}: is there memory for data.workers: {self.num_workers} x data.prefetch: "
                    f"{self.prefetch_factor} batches, and room in /dev/shm?"
                ) from error
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                return
            yield batch


class _Reporting(Dataset[Any]):
    """In a worker: what reading raises comes back as it is, where torch would make text of it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: list[Draw]) -> Any:
        try:
            return self.dataset.__getitems__(draws)
        except Exception as error:
            error.add_note(f"in a worker that reads data:\n{traceback.format_exc()}")
            return _portable(error)


def _portable(error: Exception) -> Exception:
    """`error`, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("\n".join([repr(error), *error.__notes__]))
    return error


def _as_it_is(batch: Any) -> Any:
    """The data set reads whole batches: there is nothing to collate."""
    return batch


def _server() -> BaseContext:
    """Start the process that workers are forked from, deaf to `SIGNALS`, as those will be.

    Schedulers send these to every process of a job that has to end, and a rank still needs its workers then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["credit.data.dataset"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _stay_with_rank(worker: int) -> None:
    """In a worker: hear of the job's end from the rank alone, and do not outlive it.

    torch's own watch asks for the parent process, which is the server, and that lives while a worker does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_watch_rank, daemon=True).start()


def _watch_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    while rank.is_alive():
        heard = signal.sigtimedwait(SIGNALS, 1.0)
        if heard is not None and heard.si_pid == rank.pid:
            break
    os._exit(0)
