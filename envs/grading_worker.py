"""The process in which math-verify runs: one JSON line in, one out, until stdin ends.

Started by `tutelage.envs.grading_pool`, which kills it when it is late. It bounds itself too:
memory by RLIMIT_AS, processor time by ITIMER_PROF, whose default action ends a process even while
one big-integer operation holds the interpreter lock (so an orphan can't spin on).
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys

from tutelage.envs.worker import die_with_parent

MEMORY = 3 * 2**30  # bytes of address space: 2^{10^{10}} alone would take gigabytes
SECONDS = 60.0  # processor time per request, far beyond any deadline outside


def main() -> None:
    if sys.argv[1] == "1":
        die_with_parent()
    out = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not break the protocol
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    with contextlib.suppress(ValueError, OSError):  # a lower limit may already hold
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            # Boxed, so that nothing but the whole text is taken for the answer. The gold stands
            # first: verify is not symmetric.
            seconds = max(1, int(request["seconds"]))
            gold = parse(f"\\boxed{{{request['gold']}}}", parsing_timeout=seconds)
            answer = parse(f"\\boxed{{{request['answer']}}}", parsing_timeout=seconds)
            reply = {"correct": False, "reason": "symbolic"}
            if not gold:
                reply["reason"] = "gold_unparseable"
            elif not answer:
                reply["reason"] = "unreadable"
            else:
                reply["correct"] = bool(verify(gold, answer, timeout_seconds=seconds))
        except MemoryError:
            reply = {"correct": False, "reason": "refused"}
        except Exception as error:  # the boundary: whatever a parser raises is "can't tell"
            late = "imeout" in type(error).__name__
            reply = {"correct": False, "reason": "timeout" if late else "unreadable"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
