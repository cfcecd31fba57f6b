"""Run as a program by `prepared.py`: a pickled `ProgramRequest` on stdin → pickled programs, or the pickled
`StartupError` that refuses the model, to the file descriptor that is its argument."""

from __future__ import annotations

import os
import pickle
import signal
import sys


def main(answer: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides when to give up
    # Not above, so that Ctrl-C does not end in a report while they are imported.
    from ts_parallel.checkpoint.index import read_index
    from ts_parallel.errors import PlanError, StartupError
    from ts_parallel.partition.build import make_programs

    request = pickle.load(sys.stdin.buffer)
    made: object
    try:
        programs = make_programs(request, read_index(request.folder))
        made = {own: pickle.dumps(program) for own, program in programs.items()}
    except StartupError as refused:
        made = refused
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        made = PlanError(f"the model could not be traced: {type(error).__name__}: {lines[0]}")
    with os.fdopen(answer, "wb") as stream:
        stream.write(pickle.dumps(made))


if __name__ == "__main__":
    main(int(sys.argv[1]))
