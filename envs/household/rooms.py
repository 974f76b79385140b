"""The rooms that generated games are drawn from, shaped on the statistics of the released games.

Probabilities and counts were read off the 3,553 released train games: how often a room has a
receptacle class and how many of it, which objects lie in it, how often a task type is set in it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

RECEPTACLES: Final[Mapping[str, Mapping[str, tuple[float, int, int]]]] = MappingProxyType(
    {
        "kitchen": {
            "CoffeeMachine": (1, 1, 1),
            "CounterTop": (1, 2, 3),
            "StoveBurner": (1, 4, 4),
            "Microwave": (1, 1, 1),
            "Cabinet": (1, 6, 22),
            "SinkBasin": (1, 1, 1),
            "Fridge": (1, 1, 1),
            "Toaster": (1, 1, 1),
            "GarbageCan": (1, 1, 1),
            "Drawer": (0.98, 3, 12),
            "DiningTable": (0.56, 1, 2),
            "Shelf": (0.2, 3, 4),
            "SideTable": (0.1, 1, 1),
        },
        "living": {
            "GarbageCan": (1, 1, 1),
            "Sofa": (1, 1, 2),
            "ArmChair": (0.92, 1, 3),
            "CoffeeTable": (0.86, 1, 2),
            "SideTable": (0.86, 1, 4),
            "Drawer": (0.83, 1, 10),
            "DiningTable": (0.55, 1, 2),
            "Dresser": (0.4, 1, 1),
            "TVStand": (0.35, 1, 1),
            "Shelf": (0.3, 2, 10),
            "Cabinet": (0.14, 2, 8),
        },
        "bed": {
            "GarbageCan": (1, 1, 1),
            "Bed": (1, 1, 2),
            "Drawer": (0.92, 2, 12),
            "Desk": (0.8, 1, 2),
            "Shelf": (0.68, 1, 9),
            "SideTable": (0.62, 1, 2),
            "Dresser": (0.47, 1, 1),
            "LaundryHamper": (0.24, 1, 1),
            "ArmChair": (0.2, 1, 2),
            "Safe": (0.17, 1, 1),
            "DiningTable": (0.12, 1, 1),
        },
        "bath": {
            "HandTowelHolder": (1, 1, 2),
            "TowelHolder": (1, 1, 1),
            "GarbageCan": (1, 1, 1),
            "ToiletPaperHanger": (1, 1, 1),
            "SinkBasin": (1, 1, 2),
            "Toilet": (1, 1, 1),
            "CounterTop": (0.89, 1, 2),
            "BathtubBasin": (0.65, 1, 1),
            "Drawer": (0.55, 2, 10),
            "Cabinet": (0.5, 3, 6),
            "Shelf": (0.18, 1, 3),
            "Cart": (0.07, 1, 1),
        },
    }
)
"""Room -> receptacle class -> (probability that the room has it, fewest, most)."""


def _shares(text: str) -> dict[str, float]:
    """`"Tomato Vase:.15"` -> `{"Tomato": 1.0, "Vase": .15}`."""
    pairs = (word.partition(":") for word in text.split())
    return {name: float(share or 1) for name, _, share in pairs}


OBJECTS: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "kitchen": _shares(
            """Tomato SaltShaker Potato Spatula Spoon Bread Bowl Apple Plate DishSponge PepperShaker
            Knife Mug Fork Lettuce Cup Pot SoapBottle Egg Pan ButterKnife:.96 Kettle:.5
            WineBottle:.4 Ladle:.33 Glassbottle:.24 Vase:.15 CellPhone:.1 Book:.1"""
        ),
        "living": _shares(
            """Pillow Laptop CreditCard KeyChain RemoteControl Box Statue:.97 Newspaper:.6 Vase:.6
            Watch:.5 WateringCan:.5 TissueBox:.4 Plate:.4 Book:.36 Pen:.3 Pencil:.23 CellPhone:.2
            DeskLamp:.1 Candle:.1"""
        ),
        "bed": _shares(
            """Pencil CellPhone CD Laptop Pillow CreditCard KeyChain Book AlarmClock Pen DeskLamp:.9
            Mug:.47 Bowl:.46 TennisRacket:.46 Box:.45 BaseballBat:.4 BasketBall:.36 Cloth:.2
            Statue:.13 Vase:.1"""
        ),
        "bath": _shares(
            """SprayBottle Towel HandTowel ToiletPaper Cloth SoapBottle SoapBar Candle DishSponge:.3
            TissueBox:.25"""
        ),
    }
)
"""Room -> object class -> the probability that the room has one."""

TASKS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "pick_and_place_simple": {"kitchen": 12, "living": 35, "bed": 44, "bath": 56},
        "look_at_obj_in_light": {"bed": 37, "living": 2},
        "pick_clean_then_place_in_recep": {"kitchen": 80, "bath": 26},
        "pick_heat_then_place_in_recep": {"kitchen": 1},
        "pick_cool_then_place_in_recep": {"kitchen": 1},
        "pick_two_obj_and_place": {"kitchen": 26, "living": 40, "bed": 35, "bath": 37},
    }
)
"""Task type -> room -> how often, relative to the other rooms."""
