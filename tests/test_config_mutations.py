"""Every key of a whole configuration, wrong in every way: one line that names the key, or it fails.

`python tests/test_config_mutations.py` prints how many were tried and how many were told right.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import load_config

WHOLE = """\
run: runs/a  # text
seed: 1  # whole0
steps: 60  # whole1
accept_changes: false  # flag
student:
  model: builtin:start  # text
  tokenizer: builtin:vocabulary  # text?
  dtype: float32  # choice
  device: cpu  # choice
  threads: 2  # whole1?
teachers:
  one:
    model: builtin:household  # text
    engine: transformers  # choice
    dtype: float32  # choice
    device: cpu  # choice
    cache: scores  # text?
    sleeps: false  # flag
  two:
    model: served  # text
    engine: server  # choice
    url: http://host:8000  # text
    weights: folder  # text?
    api_key_env: KEY  # text?
    timeout: 30.5  # above0
    attempts: 3  # whole1
    concurrency: 4  # whole1
tasks:
  household:
    env: tutelage/Household-v0  # text
    env_args:
      split: train  # free
    eval_args:
      split: valid_unseen  # free
    teacher: one  # text
    episodes: 16  # whole1
    group: 4  # whole1
    start: 2  # whole0
    end: 50  # whole1?
    steps: 20  # whole1?
    weight: 0.5  # above0
    expert_share: 0.5  # share
    guidance:
      by: expert  # choice
      share: 0.25  # share
      until: 0.5  # part
    objective:
      name: trust_region  # choice
      k: 8  # option
      beta: 0.25  # option
    rollout:
      max_turns: 5  # whole1
      temperature: 0.5  # least0
      context:
        turns: 2  # whole0
        repeat_task: true  # flag
  math:
    env: tutelage/Math-v0  # text
    teacher: two  # text
objective:
  name: local_support  # choice
  k: 32  # option
  renormalize: true  # option
schedule:
  policy: weighted  # choice
  weights:
    math: 2.5  # above0
  least: 0.5  # part
  max_staleness: 1  # whole0
rollout:
  engine: transformers  # choice
  temperature: 1.5  # least0
  top_p: 0.5  # part
  max_turns: 30  # whole1
  max_new_tokens: 32  # whole1
  max_live: 64  # whole1
  processes: 1  # whole0
  timeout: 60.5  # above0
  attempts: 3  # whole1
  lost: 0.5  # share
  context:
    kind: full  # choice
    repeat_task: false  # flag
    turns: 4  # whole0
    admissible: false  # flag
    system: Be brief.  # words?
vllm:
  dtype: float32  # choice?
  gpu_memory_utilization: 0.5  # part
  kv_cache_gib: 0.5  # above0?
  max_model_len: 512  # whole1?
  max_num_batched_tokens: 512  # whole1?
  tensor_parallel_size: 1  # whole1
  enforce_eager: true  # flag?
optimizer:
  name: adamw  # choice
  lr: 0.5  # above0
  weight_decay: 0.5  # least0
  clip: 0.5  # above0
  warmup: 5  # whole0
  decay: cosine  # choice
  floor: 0.5  # share
  micro_tokens: 2048  # whole1?
  recompute: false  # flag
  minibatch: 64  # whole1?
  aggregate: token  # choice
  normalize: task  # choice
learner:
  processes: 1  # whole1
  timeout: 60.5  # above0
evaluation:
  every: 20  # whole0
  episodes: 100  # whole1
  final: true  # flag
checkpoint:
  every: 10  # whole1
  keep: 2  # whole1
  best: true  # flag
journal:
  stall: 60.5  # above0
  tensorboard: true  # flag
  episodes_every: 1  # whole1
  diagnostics_every: 10  # whole1
cluster:
  address: local  # text
  workers: 2  # whole1
  threads: 1  # whole1
  timeout: 60.5  # above0
  attempts: 3  # whole1
  strategy: PACK  # choice?
  worker_resources:
    CPU: 1.5  # above0
  teacher_resources:
    CPU: 1.5  # above0
"""
"""Every line that has a value says what it takes; ?: nothing, too."""

NUMBER = ("true", "'5'", ".nan", ".inf", "-.inf", "010", "1:30", "1_0", "yes", "many", "[1]",
          "{a: 1}", "1e999", "-1")  # fmt: skip
WRONG = {
    "whole1": (*NUMBER, "1.5", "0", "1e30"),
    "whole0": (*NUMBER, "1.5", "1e30"),
    "above0": (*NUMBER, "0", "'0.5'"),
    "least0": NUMBER,
    "share": (*NUMBER, "1.5"),
    "part": (*NUMBER, "1.5", "0"),
    "flag": ("1", "0", "yes", "off", "'true'", "maybe", "[true]", "1.0", ".nan"),
    "text": ("true", "[a]", "{a: b}", "''"),
    "words": ("true", "[a]", "{a: b}"),
    "choice": ("5", "true", "nonsense_of_mine", "''", "[a]", "{a: b}"),
    "option": ("'5'", ".nan", ".inf", "010", "yes", "many", "[1]", "{a: 1}", "1:30", "null"),
    "free": (".nan", ".inf", "010", "1:30", "yes", "[.nan]", "{a: off}"),
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong configuration. kind: how it is wrong. key: what its message must name."""

    kind: str
    key: str
    text: str


def mutants() -> Iterator[Mutant]:
    """All of them, each with one mistake."""
    lines = WHOLE.splitlines()
    for at, line in enumerate(lines):
        indent = line[: len(line) - len(line.lstrip())]
        key, _, rest = line.strip().partition(":")
        value, _, kind = rest.partition("  # ")
        kind, empty = kind.rstrip("?"), kind.endswith("?")

        def told(how: str, *instead: str, at: int = at, key: str = key) -> Mutant:
            text = "\n".join([*lines[:at], *instead, *lines[at + 1 :]])
            return Mutant(how, key, text + "\n")

        for wrong in WRONG.get(kind, ()):
            yield told(f"{kind} {wrong}" if kind in WRONG else kind, f"{indent}{key}: {wrong}")
        if kind in WRONG and not empty and kind not in ("free", "option"):
            yield told("nothing given", f"{indent}{key}:")
        if kind:
            yield told("given twice", line, f"{indent}{key}:{value}")
            if indent and kind not in ("free", "option"):
                names = key in ("CPU", "math")  # of resources, any; of tasks, those that there are
                if not names or key == "math":
                    yield told("misspelt", f"{indent}{key}x:{value}")
        elif at + 1 < len(lines):  # a section
            deeper = lines[at + 1][: len(lines[at + 1]) - len(lines[at + 1].lstrip())]
            free = key in ("env_args", "eval_args", "objective") or key.endswith("resources")
            if not free and key not in ("teachers", "tasks"):
                yield told("unknown key inside", line, f"{deeper}no_such_key: 1")
            end = next(
                (i for i in range(at + 1, len(lines)) if not lines[i].startswith(deeper)),
                len(lines),
            )
            for wrong in ("5", "text", "[a]", "true"):
                text = "\n".join([*lines[:at], f"{indent}{key}: {wrong}", *lines[end:]])
                yield Mutant("a section that is none", key, text + "\n")


def verdict(mutant: Mutant, path: Path) -> str:
    """`right`: refused in one line that names the key; else what happened."""
    path.write_text(mutant.text, encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        message = str(error).removeprefix(f"{path}: ")
        if "\n" in message:
            return "more than a line"
        return "right" if mutant.key in message else "its key is not named"
    except Exception as error:
        return f"another error: {type(error).__name__}"
    return "taken"


def test_the_whole_configuration_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(WHOLE)
    config = load_config(path)
    assert config.optimizer.lr == 0.5 and config.resolve()["household"].rollout.max_turns == 5


@pytest.mark.slow
def test_every_mutant_is_refused_in_one_line_that_names_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    # libyaml composes the same nodes in a tenth of the time
    monkeypatch.setattr(yaml, "BaseLoader", getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    found = [(mutant, verdict(mutant, path)) for mutant in mutants()]
    assert len(found) > 1000
    wrong = [(m.kind, m.key, what) for m, what in found if what != "right"]
    assert wrong == []


if __name__ == "__main__":
    tried, right, said = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for one in mutants():
            kind, what = one.kind.split(" ")[0], verdict(one, Path(folder) / "a.yaml")
            tried[kind] += 1
            right[kind] += what == "right"
            said[what] += 1
            if "-v" in sys.argv and what != "right":
                print(what, "|", one.kind, "|", one.key)
    for kind in tried:
        print(f"{kind:10} tried {tried[kind]:5} right {right[kind]:5}")
    print(f"{'all':10} tried {tried.total():5} right {right.total():5}; {dict(said)}")
