"""tutelage.scheduler"""

import os

if __name__ == "scheduler":
    raise ImportError("import tutelage.scheduler, not scheduler: install the project first")

# OpenMP reads this once, when torch loads it: so it is set here, before anything imports torch. By
# default a thread that waits for another spins for milliseconds, perhaps on the very core that the
# other one needs. Some microseconds are enough; with none at all, every operator would pay for
# waking its threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# How many of its compiled products torch keeps, and oneDNN below it. Each takes about 0.2 MB, and
# by default both keep 1,024.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
