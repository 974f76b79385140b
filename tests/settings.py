"""The scheduler's records as a config without further keys would fill them.

The records have no defaults of their own; these are the config's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tutelage.distill.config.resolved import played
from tutelage.distill.config.sections import ClusterConfig, ContextConfig, RolloutConfig
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.teachers.service import Teacher, TeacherService
from tutelage.envs.pool import EnvironmentPool
from tutelage.scheduler.cluster import ClusterSettings
from tutelage.scheduler.contexts import ContextSettings
from tutelage.scheduler.rollouts import TaskRollout
from tutelage.scheduler.timetable import TaskPlan


def rollout(env: str, env_args: Mapping[str, Any] | None = None, **keys: Any) -> TaskRollout:
    return played(RolloutConfig(**keys), env, env_args or {})


def context(**keys: Any) -> ContextSettings:
    return ContextConfig(**keys).settings()


PLAIN = TaskPlan(
    episodes=16,
    group=1,
    teachers={},
    labels=False,
    expert_share=(1.0, 1.0),
    guided_share=0.0,
    guided_until=1.0,
    start=0,
    end=None,
    most=None,
)


def schedule(**fields: Any) -> TaskPlan:
    return replace(PLAIN, **fields)


def cluster(**keys: Any) -> ClusterSettings:
    return ClusterSettings(**ClusterConfig(**keys).model_dump())


def pool(env: str, env_args: Mapping[str, Any] | None = None, **keys: Any) -> EnvironmentPool:
    how = rollout(env, env_args, **keys)
    return EnvironmentPool(
        how.env,
        how.env_args,
        processes=how.processes,
        timeout=how.timeout,
        max_observation=how.max_observation,
    )


def serving(teacher: Teacher, *, digest: str, **keys: Any) -> TeacherService:
    config = TeacherConfig(model="-")
    given = {"dtype": config.dtype, "cache": config.cache, "sleeps": config.sleeps} | keys
    return TeacherService("one", teacher, digest=digest, **given)
