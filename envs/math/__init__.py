"""Single-turn mathematics: generated arithmetic, problem files, and the environment over both."""

if __name__ == "envs.math":
    raise ImportError("import tutelage.envs, not envs: install the project first")
