"""The plan of the house, from its imports: rooms, floors, arrows, circles; lines and comments.

    python tests/house.py [--root FOLDER] [--draw WING]

A room is a module or a sub-package of a wing. An arrow says that one imports another, at its top or
inside a function. A room's floor is one above the highest that it imports.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

WINGS = ("envs", "scheduler", "evaluation", "distill")  # each imports only those before it

Arrows = Mapping[str, set[str]]


def imports(source: Path) -> Iterator[str]:
    """The full name of everything that a file imports."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: a relative import; say tutelage.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(root: Path, wing: str) -> dict[str, Path]:
    """A wing's modules by their names under it: `student.learner`."""
    found = {}
    for path in sorted((root / wing).rglob("*.py")):
        parts = path.relative_to(root / wing).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def module_arrows(root: Path, wing: str) -> dict[str, set[str]]:
    """Which module of a wing imports which."""
    own = modules(root, wing)
    arrows: dict[str, set[str]] = {name: set() for name in own}
    for name, path in own.items():
        for full in imports(path):
            inner = full.removeprefix(f"tutelage.{wing}.")
            for target in (inner, inner.rpartition(".")[0]):
                if inner != full and target in own:
                    arrows[name] |= {target} - {name}
                    break
    return arrows


def room_arrows(arrows: Arrows) -> dict[str, set[str]]:
    """The same between rooms."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        if room := name.partition(".")[0]:
            found.setdefault(room, set()).update(
                {other.partition(".")[0] for other in targets} - {room, ""}
            )
    return found


def circle(arrows: Arrows) -> list[str]:
    """The rooms of a circle, in order; empty: there is none.."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def opened(arrows: Arrows) -> tuple[dict[str, set[str]], list[list[str]]]:
    """(the arrows without those of circles, the circles)."""
    left, found = {name: set(targets) for name, targets in arrows.items()}, []
    while around := circle(left):
        found.append(around)
        for one, other in pairwise(around):
            left[one].discard(other)
            left[other].discard(one)
    return left, found


def floors(arrows: Arrows) -> dict[str, int]:
    """Each room's floor, from 1."""
    left, _ = opened(arrows)
    found: dict[str, int] = {}
    for name in TopologicalSorter(left).static_order():
        found[name] = 1 + max((found[other] for other in left.get(name, ())), default=0)
    return found


def lines(root: Path, wing: str) -> tuple[int, int]:
    """(lines, comments) of a wing."""
    texts = [path.read_text(encoding="utf-8") for path in (root / wing).rglob("*.py")]
    tokens = (t for text in texts for t in tokenize.generate_tokens(io.StringIO(text).readline))
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    return sum(len(text.splitlines()) for text in texts), comments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--draw", metavar="WING", help="every room with its floor and arrows")
    asked = parser.parse_args()
    print("| wing | rooms | floors | arrows | circles | modules | lines | comments |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    totals = [0, 0]
    for wing in WINGS:
        inside = module_arrows(asked.root, wing)
        rooms = room_arrows(inside)
        count, comments = lines(asked.root, wing)
        totals = [totals[0] + count, totals[1] + comments]
        share = f"{100 * comments / count:.1f} %"
        shape = (len(rooms), max(floors(rooms).values()), sum(map(len, rooms.values())))
        row = (wing, *shape, len(opened(inside)[1]), len(inside), f"{count:,}", share)
        print(f"| {' | '.join(map(str, row))} |")
    print(f"| together | | | | | | {totals[0]:,} | {100 * totals[1] / totals[0]:.1f} % |")
    if asked.draw:
        rooms = room_arrows(module_arrows(asked.root, asked.draw))
        for name, floor in sorted(floors(rooms).items(), key=lambda pair: (-pair[1], pair[0])):
            print(f"{floor}  {name:12} -> {', '.join(sorted(rooms.get(name, ())))}")


if __name__ == "__main__":
    main()
