"""Harm a real server while requests are open, and see that nobody waits for ever, gets a wrong answer or another's.

    python examples/fault_test.py                                       every fault once
    python examples/fault_test.py --faults kill-follower --times 20     one, as often as shows what is rare
    python examples/fault_test.py --list

Each fault strikes `ts-parallel serve` of the demo model on two ranks, in float32, with streams and whole answers open,
at a moment of chance. Their texts are compared with those of the server before. It prints a table, and exits with 1
where a request hung, was wrong or another's, where the server did not answer again, or left anything behind.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from faults.kinds import FAULTS, Fault
from faults.report import Row, machine, table, write_json
from faults.server import Server
from faults.sites import Impossible
from faults.trial import Outcome, expected_answers, run_trial

NUM_WHOLE = 3
_MORE_THAN_IT_MAY = 4.0
"""A stream is waited for so many times as long as it may hang, to know that it hangs and is not late."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Harm a real server, and see what its clients see.")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--faults", nargs="+", choices=names, default=names, metavar="NAME", help="these alone")
    parser.add_argument("--times", type=int, default=1, help="how often each fault strikes (1)")
    parser.add_argument("--streams", type=int, default=8, help="streams that are open then (8)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--list", action="store_true", help="say which faults there are, and end")
    return parser.parse_args()


def try_fault(fault: Fault, times: int, num_streams: int) -> Row:
    """A server for all trials, or one each where the fault ends it."""
    row = Row(fault)
    try:
        while len(row.outcomes) < times:
            with fault.site() as server:
                _try_server(server, row, times, num_streams)
    except Impossible as why:
        row.skipped = str(why)
    return row


def _try_server(server: Server, row: Row, times: int, num_streams: int) -> None:
    try:
        server.start()
        expected = expected_answers(server)
        while len(row.outcomes) < times:
            row.outcomes.append(_trial(server, row.fault, expected, num_streams))
            if not server.is_running or row.outcomes[-1].recovered is None:
                break
    finally:
        left = server.stop()
        if row.outcomes:
            row.outcomes[-1].left += left


def _trial(server: Server, fault: Fault, expected: dict[str, str], num_streams: int) -> Outcome:
    bound = fault.seconds_to_know * _MORE_THAN_IT_MAY
    outcome = run_trial(server, expected, fault.strike, num_streams, NUM_WHOLE, bound)
    if fault.ends_server and not server.is_running:  # who runs it starts it again, which is all that it takes
        outcome.recovered = server.seconds_to_start
    print(f"{fault.name}: {outcome.as_json()}", file=sys.stderr, flush=True)
    return outcome


def main() -> int:
    given = arguments()
    chosen = [fault for fault in FAULTS if fault.name in given.faults]
    if given.list:
        print("\n".join(f"{fault.name:16} {fault.what}: {fault.expected}" for fault in FAULTS))
        return 0
    rows = [try_fault(fault, given.times, given.streams) for fault in chosen]
    command = f"python examples/fault_test.py {shlex.join(sys.argv[1:])}".strip()
    print(f"`{command}`, {machine()}\n\n{table(rows)}")
    if given.json is not None:
        write_json(given.json, rows, command)
    complaints = [text for row in rows for text in row.complaints()]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
