"""The process in which math-verify runs: requests in, verdicts out, until the caller hangs up.

Started by `tutelage.envs.grading.pool`. It says that it is ready once it has compared something:
math-verify imports half of sympy at its first comparison, which is no answer's time. Nothing here
looks at the clock on the wall, and math-verify's own alarms, which it swallows and calls a wrong
answer, are off: a request has a number of processor seconds, and where they run out ITIMER_PROF
ends the process, even while one big-integer operation holds the interpreter lock. A machine that
has no time for us therefore decides nothing. Memory is bounded by RLIMIT_AS.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import time

from tutelage.envs.child import Connection

MEMORY = 3 * 2**30  # bytes of address space: 2^{10^{10}} alone would take gigabytes
START_SECONDS = 120.0  # processor time for the imports: a hundred times what they take
LEAST, MOST = 0.01, 3600.0  # processor seconds of a request: a timer at 0 would be none

# Gold, answer, whether they are equal: once through the parser, numbers, simplification, sets.
WARM_UP = (
    ("x^2+x", "x(x+1)", True),
    ("x^2+x", "x^2", False),
    ("\\frac{\\pi}{4}", "\\pi\\sqrt{\\frac{1}{16}}", True),
    ("\\{1,x\\}", "\\{x,1\\}", True),
)


def main(connection: Connection) -> None:
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent may have it ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, START_SECONDS)
    broken = _warm_up()
    if broken is not None:
        connection.send({"broken": broken})
        return
    connection.send({"ready": True, "seconds": time.process_time()})
    for request in connection:
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, min(max(request["seconds"], LEAST), MOST))
        correct, reason = _bounded(request["answer"], request["gold"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = time.process_time() - begun
        connection.send({"correct": correct, "reason": reason, "seconds": used})


def _warm_up() -> str | None:
    """What is wrong with math-verify as it is installed; None: it compares as it should."""
    try:
        import math_verify  # noqa: F401 (what it takes to load, before memory is bounded)

        import tutelage.envs.grading.algebra  # noqa: F401

        with contextlib.suppress(ValueError, OSError):  # a lower limit may already hold
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for gold, answer, equal in WARM_UP:
            if verified(answer, gold) != (equal, "symbolic"):
                return f"it takes {answer} for {'another than' if equal else 'the same as'} {gold}"
    except (MemoryError, OSError):  # of the machine, not of what is installed: try again
        raise
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return None


def _bounded(answer: str, gold: str) -> tuple[bool, str]:
    try:
        return compare(answer, gold)
    except MemoryError:
        return False, "refused"
    except Exception:  # the boundary: whatever a parser raises is "can't tell"
        return False, "unreadable"


def compare(answer: str, gold: str) -> tuple[bool, str]:
    """(correct, reason), without any clock: by values where our own grammar reads both sides."""
    from tutelage.envs.grading.algebra import decide, plain

    return decide(answer, gold) or verified(plain(answer), plain(gold))


def verified(answer: str, gold: str) -> tuple[bool, str]:
    """(correct, reason) by math-verify."""
    from math_verify import parse, verify

    # Boxed, so that nothing but the whole text is taken for the answer. The gold stands first:
    # verify is not symmetric.
    wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    written = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not wanted:
        return False, "gold_unparseable"
    if not written:
        return False, "unreadable"
    return bool(verify(wanted, written, timeout_seconds=None)), "symbolic"
