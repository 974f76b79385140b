"""tutelage.evaluation"""

if __name__ == "evaluation":
    raise ImportError("import tutelage.evaluation, not evaluation: install the project first")
