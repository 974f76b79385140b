"""tutelage.scheduler"""

if __name__ == "scheduler":
    raise ImportError("import tutelage.scheduler, not scheduler: install the project first")
