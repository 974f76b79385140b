"""tutelage.scheduler"""

import os

if __name__ == "scheduler":
    raise ImportError("import tutelage.scheduler, not scheduler: install the project first")

# OpenMP reads this once, as torch loads it: so it stands where no torch is loaded yet. By default a
# thread that waits for another one turns in a loop for milliseconds: beside a busy process on the
# very core that the other one needs. Some microseconds will do; with none at all every operator
# pays for waking a thread.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
