"""A lane is the process of one provider in one dtype, seen from the process that asks it."""

import multiprocessing
from typing import Any

from benchmarks import worker


class Failed(Exception):
    """What a provider's process answered instead of a result."""


def _context() -> Any:
    """One process imports torch, and each lane begins as a copy of it; where there is no fork, each imports it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


class Lane:
    def __init__(self, provider: str, dtype: str, threads: int) -> None:
        context = _context()
        self.connection, theirs = context.Pipe()
        arguments = (theirs, provider, dtype, threads)
        self.process = context.Process(target=worker.main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            good, answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            raise Failed(f"its process ended with exit code {self.process.exitcode}") from None
        if not good:
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
