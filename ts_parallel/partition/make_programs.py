"""Run as a program by `prepared.py`: a pickled `ProgramRequest` on stdin → pickled programs, or the pickled
`StartupError` that refuses the model, to the file descriptor that is its argument."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ts_parallel.errors import StartupError
    from ts_parallel.partition.program import ProgramRequest


def make(request: ProgramRequest) -> dict[tuple[int, int], bytes] | StartupError:
    """The pickled programs of all ranks, by tensor-parallel rank and pipeline rank, or what refuses the model."""
    # Not above, so that Ctrl-C does not end in a report while they are imported.
    from ts_parallel.checkpoint.index import read_index
    from ts_parallel.errors import PlanError, StartupError
    from ts_parallel.partition.build import make_programs

    gc.freeze()  # what was imported stays: a trace makes millions of objects, and need not look through those each time
    try:
        programs = make_programs(request, read_index(request.folder, request.settings))
        return {own: pickle.dumps(program) for own, program in programs.items()}
    except StartupError as refused:
        return refused
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return PlanError(f"the model could not be traced: {type(error).__name__}: {lines[0]}")


def main(answer: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides when to give up
    made = make(pickle.load(sys.stdin.buffer))
    with os.fdopen(answer, "wb") as stream:
        stream.write(pickle.dumps(made))


if __name__ == "__main__":
    main(int(sys.argv[1]))
