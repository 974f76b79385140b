"""Text environments as Gymnasium environments: households (ALFWorld) and mathematics.

Importing this module registers their ids. Gymnasium before 1.0 also does so by itself, as soon as
the package is installed, through its entry-point group; later versions have no such plug-ins, so
say `import tutelage.envs`, or name the module in the id: "tutelage.envs:tutelage/Household-v0".
"""

if __name__ == "envs":
    raise ImportError("import tutelage.envs, not envs: install the project first")

_ENTRY_POINTS = {
    "Household": "tutelage.envs.household.generated:HouseholdEnv",
    "ALFWorld": "tutelage.envs.household.released:ALFWorldEnv",
    "Math": "tutelage.envs.math.env:MathEnv",
}


def register() -> None:
    """Register the environments; a second call does nothing.

    Gymnasium before 1.0 calls this while it is itself being imported, perhaps by the line below: so
    only its registration module is there yet, and this function must stand before that import.
    """
    from gymnasium.envs import registration

    for name, entry_point in _ENTRY_POINTS.items():
        identifier = f"tutelage/{name}-v0"
        if identifier not in registration.registry:
            # The checker looks at every character of every text; check_env does that in the tests.
            registration.register(identifier, entry_point=entry_point, disable_env_checker=True)


register()
