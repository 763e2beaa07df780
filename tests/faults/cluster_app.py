"""The product's application with a scripted guard, and its deployment from a process of its own.

    python -m tests.faults.cluster_app ADDRESS [MOST_GUARDS]

deploys what the environment's settings say, as `serve deploy` does; with MOST_GUARDS, that many guards at most.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import DeploymentSchema

from pipelines.autoscaling import serve_config
from pipelines.serving import build as serve_build
from pipelines.serving.app import bind_application
from pipelines.serving.log_config import LOGGING_CONFIG
from services.core.settings import Settings, load
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage
from tests.faults.guard import assessment_of

TAKES_S: Final = 0.4
"""A guard, for one image."""
IN_FLIGHT: Final = 2
"""Images that a guard judges at a time."""


@serve.deployment(name="Guard", health_check_period_s=5, health_check_timeout_s=60)
class TimedGuard:
    """Says what the scripted guard of the fault suite says, after a while, and who said it."""

    def __init__(self, settings: Settings) -> None:
        self._places = asyncio.Semaphore(settings.guard_in_flight)
        self._engine = f"scripted, process {os.getpid()}"

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        async with self._places:
            await asyncio.sleep(TAKES_S * len(policies))
        said = assessment_of(image.sha256)
        return [replace(said, model=said.model.model_copy(update={"engine": self._engine}))] * len(policies)


def build(arguments: serve_build.ApplicationArguments) -> Application:
    """The product's application, with that guard."""
    return bind_application(arguments, guard_gpus=1, guard=TimedGuard)


def deploy(settings: Settings, most_guards: int | None) -> None:
    """Tell Serve what is wanted; it goes on by itself."""
    plan = serve_build.make_deploy_schema(settings)
    (deployed,) = plan.applications
    deployed.import_path = f"{__spec__.name}:{build.__name__}"
    bounds = settings if most_guards is None else settings.model_copy(update={"guard_max_replicas": most_guards})
    # Always there: where it comes or goes, Serve builds the application anew.
    guard = DeploymentSchema(name="Guard", autoscaling_config=serve_config.guard_options(bounds)["autoscaling_config"])
    deployed.deployments = [guard]
    serve.start(proxy_location="Disabled", logging_config=LOGGING_CONFIG)
    serve.context._get_global_client().deploy_apps(plan)


if __name__ == "__main__":
    address, *most = sys.argv[1:]
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    deploy(load(), int(most[0]) if most else None)
    ray.shutdown()
