"""tutelage.distill"""

if __name__ == "distill":
    raise ImportError("import tutelage.distill, not distill: install the project first")

import tutelage.scheduler  # noqa: F401 before torch: it says how torch's threads wait
