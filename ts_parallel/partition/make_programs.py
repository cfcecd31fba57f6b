"""Run as a program by `prepared.py`: a pickled `ProgramRequest` on stdin → one file a rank, see `file_of_rank`.

Where the model is refused, the pickled error goes to stdout, and the exit status is 1.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from ts_parallel.checkpoint.index import read_index
from ts_parallel.errors import StartupError
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.prepared import write_programs


def main(stem: Path) -> int:
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    request = pickle.load(sys.stdin.buffer)
    try:
        programs = make_programs(request, read_index(request.folder))
    except StartupError as refused:
        answer.write(pickle.dumps(refused))
        answer.close()
        return 1
    write_programs(stem, programs)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
