"""tutelage.distill"""

if __name__ == "distill":
    raise ImportError("import tutelage.distill, not distill: install the project first")
