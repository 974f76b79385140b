"""`tutelage play` and `tutelage envs`: play an environment by hand or watch a policy; list them."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium

import tutelage.envs  # noqa: F401 - registers the ids
from tutelage.distill.config.faults import ConfigError
from tutelage.envs.names import nearest
from tutelage.envs.plugins import refusal

POLICIES = ("hand", "expert", "random")
Choose = Callable[[str, Mapping[str, Any]], str | None]
"""Chooses an action from an observation and its info; None: the player leaves the game."""


def play(
    env_id: str, *, env_args: Mapping[str, Any], policy: str, index: int | None, seed: int
) -> int:
    """Play one episode on the terminal. policy: hand, expert, random, or a model's folder.

    Raises:
        ValueError: an unknown environment or option, or a policy that it does not support.
    """
    args = dict(env_args)
    try:
        if policy == "expert" and "expert" in _options(_class_of(_spec(env_id))):
            # costly to compute, so environments tell the expert's action only if asked
            args.setdefault("expert", True)
        env = gymnasium.make(env_id, **args)
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:  # a foreign module may raise anything, SystemExit included
        raise ValueError(f"{env_id}: {refusal(env_id, error)[0]}") from error
    try:
        return _played(env, env_id, _chooser(policy, seed), policy=policy, index=index, seed=seed)
    finally:
        _asked(env_id, "close", env.close)


def _played(
    env: Any, env_id: str, choose: Choose, *, policy: str, index: int | None, seed: int
) -> int:
    options = None if index is None else {"index": index}
    observation, info = _asked(env_id, "reset", lambda: env.reset(seed=seed, options=options))
    total, done = 0.0, False
    while not done:
        print(observation)
        action = choose(observation, info)
        if action is None:
            print("left the game")
            return 0
        if policy != "hand":
            print(f"> {action}")
        observation, reward, terminated, truncated, info = _asked(
            env_id, "step", partial(env.step, action)
        )
        total, done = total + float(reward), bool(terminated or truncated)
    print(observation)
    # as in rollouts: without success in info a positive reward counts as one
    print(f"{'won' if info.get('success', total > 0) else 'lost'}; reward {total:g}")
    return 0


def _asked(env_id: str, what: str, ask: Callable[[], Any]) -> Any:
    """Call the environment. Raises ValueError where it refuses, RuntimeError where it breaks."""
    try:
        return ask()
    except (ValueError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RuntimeError(f"{env_id}: its {what} raised {reason}") from error


def _chooser(policy: str, seed: int) -> Choose:
    if policy == "hand":
        return _by_hand
    if policy == "expert":
        return lambda _, info: str(_required(info, "expert_action", policy))
    if policy == "random":
        rng = random.Random(seed)
        return lambda _, info: rng.choice(list(_required(info, "admissible_actions", policy)))
    try:
        return _model_player(policy)
    except ConfigError as error:
        near = nearest(policy, POLICIES)
        hint = f" (did you mean {near!r}? " if near else " ("
        raise ValueError(
            f"--policy {policy}: {error}{hint}{', '.join(POLICIES)}, or a model)"
        ) from None


def _by_hand(_: str, info: Mapping[str, Any]) -> str | None:
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return None
        if text.strip() != "?":
            return text
        print(
            "\n".join(
                info.get("admissible_actions", ["this environment does not list its actions"])
            )
        )


def _required(info: Mapping[str, Any], key: str, policy: str) -> Any:
    if key not in info:
        raise ValueError(
            f"--policy {policy} needs info[{key!r}], which this environment does not give"
        )
    return info[key]


def _model_player(reference: str) -> Callable[[str, Mapping[str, Any]], str]:
    """A model's greedy replies, with the whole history as context."""
    # imported here: by hand, playing needs no torch
    from tutelage.distill.config.sections import ContextConfig
    from tutelage.distill.engines.transformers import TransformersEngine
    from tutelage.distill.models.conversations import stop_ids
    from tutelage.distill.models.loading import load_model, load_tokenizer
    from tutelage.distill.models.student import Student
    from tutelage.scheduler.chat import Chat
    from tutelage.scheduler.contexts import Context, Reply
    from tutelage.scheduler.engine import Completion, Request
    from tutelage.scheduler.episodes import GREEDY

    tokenizer = load_tokenizer(reference)
    chat = Chat(tokenizer, stop_ids=stop_ids(reference))
    model = load_model(reference, dtype="float32", device="auto")
    engine = TransformersEngine(Student(model, vocabulary=len(tokenizer)))
    context = Context(chat, ContextConfig(repeat_task=True).settings())

    def reply(observation: str, info: Mapping[str, Any]) -> str:
        context.observe(observation, info)
        room = min(256, engine.max_context - len(context.prompt_ids))
        engine.submit(
            Request(
                session=0,
                ids=context.prompt_ids,
                max_new_tokens=room,
                stop_ids=chat.eos_ids,
                sampling=GREEDY,
                seed=0,
            )
        )
        found: list[Completion] = []
        while not found:
            found = engine.step()
        action = chat.text(found[0].ids)
        context.reply(
            Reply(ids=found[0].ids, logprobs=found[0].logprobs, closed=found[0].stopped),
            action=action,
        )
        return context.read(action).command

    return reply


def describe_environments() -> str:
    """Every registered `tutelage/` environment: what it is, its options and their defaults."""
    blocks = []
    for env_id in sorted(i for i in gymnasium.registry if i.startswith("tutelage/")):
        cls = _class_of(gymnasium.registry[env_id])
        text = inspect.cleandoc(cls.__doc__ or "").replace("\n", "\n  ")
        options = [f"    {name} = {default}" for name, default in _options(cls).items()]
        blocks.append("\n".join([env_id, f"  {text}", "  Options and defaults:", *options]))
    return "\n\n".join(blocks)


def _spec(env_id: str) -> Any:
    """The registered environment of an id; imports the module that `module:id` names first."""
    # Gymnasium's own spec() reads no module
    module, colon, name = env_id.rpartition(":")
    if colon:
        importlib.import_module(module)
    return gymnasium.spec(name)


def _class_of(spec: Any) -> Any:
    """The class of a registered environment, or the function that makes it."""
    entry_point = spec.entry_point
    if not isinstance(entry_point, str):
        return entry_point
    return gymnasium.envs.registration.load_env_creator(entry_point)


def _options(cls: Any) -> dict[str, str]:
    """A class's options with their defaults, with those that it passes to its parents."""
    found: dict[str, str] = {}
    for parent in getattr(cls, "__mro__", ()):  # a factory function tells nothing
        if "__init__" not in vars(parent):
            continue
        parameters = list(inspect.signature(parent).parameters.values())
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY or (
                parent is cls and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ):
                required = parameter.default is parameter.empty
                # setdefault: a class comes before its parents, and its own default holds
                found.setdefault(
                    parameter.name, "required" if required else repr(parameter.default)
                )
        # without **kwargs it passes no options on
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found
