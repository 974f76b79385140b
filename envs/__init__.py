"""Text environments as Gymnasium environments: households (ALFWorld) and mathematics.

Importing this module registers their ids. Gymnasium 1.0 dropped the plug-ins that registered a
package's environments as soon as it was installed, so say `import tutelage.envs`, or name the
module in the id: "tutelage.envs:tutelage/Household-v0".
"""

import gymnasium as gym

if __name__ == "envs":
    raise ImportError("import tutelage.envs, not envs: install the project first")

_ENTRY_POINTS = {
    "Household": "tutelage.envs.household.generated:HouseholdEnv",
    "ALFWorld": "tutelage.envs.household.released:ALFWorldEnv",
    "Math": "tutelage.envs.math.env:MathEnv",
}


def register() -> None:
    """Register the environments; a second call does nothing.

    Gymnasium before 1.0 calls this through its entry-point group.
    """
    for name, entry_point in _ENTRY_POINTS.items():
        identifier = f"tutelage/{name}-v0"
        if identifier not in gym.registry:
            # The checker looks at every character of every text; check_env does that in the tests.
            gym.register(identifier, entry_point=entry_point, disable_env_checker=True)


register()
