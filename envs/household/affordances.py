"""What lies where and what can be done with it: the affordances of an ALFWorld household.

The tables are those of ALFWorld 0.4.2, `alfworld/gen/constants.py` (`VAL_RECEPTACLE_OBJECTS`, MIT
licence), without sliced objects, which no text game has. What can be heated, cooled, cleaned and
sliced was read off the facts of the released games. They are copied here because games must be
generated where alfworld is not installed; a test compares them with the package where it is.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_ANY_TABLE: Final = """
    AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle CellPhone
    Cloth CreditCard Cup DishSponge Egg Fork Glassbottle HandTowel Kettle KeyChain Knife Ladle
    Laptop Lettuce Mug Newspaper Pan PaperTowel Pen Pencil PepperShaker Plate Pot Potato
    RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue TennisRacket
    TissueBox ToiletPaper ToiletPaperRoll Tomato Vase Watch WateringCan WineBottle
"""
_HOLDS: Final = {
    "ArmChair": """
        BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow
        RemoteControl
    """,
    "BathtubBasin": "Cloth DishSponge HandTowel SoapBar",
    "Bed": """
        BaseballBat BasketBall Book CellPhone Laptop Newspaper Pillow TennisRacket
    """,
    "Cabinet": """
        Book Bowl Box CD Candle Cloth Cup DishSponge Glassbottle HandTowel Kettle Ladle Mug
        Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar SoapBottle SprayBottle
        TissueBox ToiletPaper ToiletPaperRoll Vase WateringCan WineBottle
    """,
    "Cart": """
        Candle Cloth DishSponge HandTowel Mug PaperTowel Plunger SoapBar SoapBottle SprayBottle
        Statue TissueBox ToiletPaper ToiletPaperRoll Vase
    """,
    "CoffeeMachine": "Mug",
    "Desk": """
        AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup Glassbottle
        KeyChain Laptop Mug Newspaper Pen Pencil Plate RemoteControl SoapBottle SprayBottle Statue
        TennisRacket TissueBox ToiletPaper ToiletPaperRoll Vase Watch WateringCan WineBottle
    """,
    "Drawer": """
        Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork HandTowel KeyChain
        Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl SaltShaker SoapBar SoapBottle
        Spatula Spoon SprayBottle TissueBox ToiletPaper ToiletPaperRoll Watch WateringCan
    """,
    "Dresser": """
        AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup Glassbottle
        KeyChain Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle Statue
        TennisRacket TissueBox ToiletPaper ToiletPaperRoll Vase Watch WateringCan WineBottle
    """,
    "Fridge": """
        Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato WineBottle
    """,
    "GarbageCan": """
        Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper PaperTowel Pen Pencil
        Potato SoapBar SoapBottle SprayBottle TissueBox ToiletPaper ToiletPaperRoll Tomato
        WineBottle
    """,
    "HandTowelHolder": "HandTowel",
    "LaundryHamper": "Cloth",
    "Microwave": "Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato",
    "Ottoman": """
        BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow
        RemoteControl
    """,
    "Safe": "CD CellPhone CreditCard KeyChain Statue Vase Watch",
    "Shelf": """
        AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge Glassbottle
        HandTowel Kettle KeyChain Mug Newspaper PaperTowel Pen Pencil PepperShaker Plate Pot
        RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue TissueBox ToiletPaper
        ToiletPaperRoll Vase Watch WateringCan WineBottle
    """,
    "SinkBasin": """
        Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle HandTowel Kettle Knife
        Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato
    """,
    "Sofa": """
        BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow
        RemoteControl
    """,
    "StoveBurner": "Kettle Pan Pot",
    "Toilet": """
        Candle Cloth DishSponge HandTowel Newspaper PaperTowel SoapBar SoapBottle SprayBottle
        TissueBox ToiletPaper ToiletPaperRoll
    """,
    "ToiletPaperHanger": "ToiletPaper ToiletPaperRoll",
    "TowelHolder": "Towel",
    "TVStand": "TissueBox",
    "CoffeeTable": _ANY_TABLE,
    "CounterTop": _ANY_TABLE,
    "DiningTable": _ANY_TABLE,
    "SideTable": _ANY_TABLE,
}
CAN_CONTAIN: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {receptacle: frozenset(objects.split()) for receptacle, objects in _HOLDS.items()}
    | {"Toaster": frozenset()}  # holds sliced bread only
)
"""Receptacle class -> the object classes that may be put in or on it."""

LAMP: Final = "DeskLamp"
LAMP_SPOTS: Final = frozenset({"Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable"})
"""Where a lamp may stand in the released games. CAN_CONTAIN has none: nobody can move a lamp."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPENABLE: Final = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})
HEATABLE: Final = _words("Apple Bread Cup Egg Mug Plate Potato Tomato")
COOLABLE: Final = HEATABLE | _words("Bowl Lettuce Pan Pot WineBottle")
CLEANABLE: Final = _words(
    "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug Pan Plate "
    "Pot Potato SoapBar Spatula Spoon Tomato"
)
SLICEABLE: Final = _words("Apple Bread Egg Lettuce Potato Tomato")

CHANGES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "pick_clean_then_place_in_recep": ("clean", "SinkBasin"),
        "pick_heat_then_place_in_recep": ("heat", "Microwave"),
        "pick_cool_then_place_in_recep": ("cool", "Fridge"),
    }
)
"""Task type -> the verb that changes the object, and the receptacle class that it is done with."""
