"""Reads DAPO-Math-17K as it is published (BytedTsinghua-SIA), and files in the same layout, verl's.

A row has `prompt`, a list of one message, and `reward_model.ground_truth`. The published parquet
file repeats each of its 17 thousand problems about a hundred times, wraps them in an instruction to
answer after "Answer:", and has a fifth of them in Chinese. What is left here are the English part's
bare problems, to be asked in the environment's own prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the"
    " form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

# Ideographs alone: punctuation in full width also stands in English problems, and with these three
# blocks the English part has the 14,116 problems that others count.
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")

Row = tuple[str, Mapping[str, Any]]


def english(place: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The English rows as {"problem", "answer"}, each published row once. Warns of how much it
    leaves out, so that a file that is not what it seems shows.

    Raises:
        ValueError: a row of another layout, by its place.
    """
    seen: set[tuple[str, str]] = set()
    repeated = chinese = 0
    for where, row in rows:
        prompt, answer = _prompt(where, row.get("prompt")), _truth(where, row.get("reward_model"))
        if (prompt, answer) in seen:
            repeated += 1
            continue
        seen.add((prompt, answer))
        # Exact strings: str.strip(characters) would eat letters of the problem.
        problem = prompt.removeprefix(PREFIX).removesuffix(SUFFIX)
        if _CHINESE.search(problem):
            chinese += 1
            continue
        yield where, {"problem": problem, "answer": answer}
    log.warning("%s: left out %d repeated rows and %d Chinese problems", place, repeated, chinese)


def _prompt(where: str, messages: Any) -> str:
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping):
        content = messages[0].get("content")
        if isinstance(content, str):
            return content
    raise ValueError(
        f"{where}: 'prompt' holds {messages!r:.60}, not a list of one message with a 'content', as"
        " layout=dapo wants"
    )


def _truth(where: str, reward_model: Any) -> str:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(
            f"{where}: 'reward_model' holds {reward_model!r:.60}, without a 'ground_truth', as"
            " layout=dapo wants"
        )
    return str(truth)
