"""The application as `serve deploy` and KubeRay build it: `pipelines.serving.build:build`, with typed arguments."""

from collections.abc import Callable
from typing import Final

from pydantic_settings import SettingsConfigDict
from ray.serve import Application
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from pipelines.autoscaling import serve_config as elastic
from pipelines.serving.app import APPLICATION, application
from services.core.errors import PolicyUnavailable
from services.core.settings import Settings, require
from services.policies.registry import PolicyRegistry

QUIET: Final = LoggingConfig(log_level="WARNING", enable_access_log=False)

_GUARD_GPUS: Final = 1.0
"""GPUs of a guard replica where no setting says: a cluster whose GPU nodes come on demand has none to be counted."""
_REACH_S: Final = 60.0
"""How long the policy bucket may take to answer; Serve does not build again by itself."""


class Arguments(Settings):
    """`args` of the application: every setting by its name in lower case, without the prefix.

    What is not given is read from the environment of the node that builds. One that does not exist is refused, so
    that a typing error is found before anything is deployed.
    """

    model_config = SettingsConfigDict(extra="forbid")


def build(arguments: Arguments) -> Application:
    """Check the settings, publish the built-in policy where the bucket holds none, and make the application.

    Raises:
        ConfigurationError: a setting is missing, SLUICE_MODEL names no checkpoint, or there is no policy bucket.
        PolicyUnavailable: the policy bucket did not answer within a minute.
    """
    require(arguments)
    gpus = _GUARD_GPUS if arguments.guard_gpus is None else arguments.guard_gpus
    built = application(arguments, guard_gpus=gpus)
    _patiently(PolicyRegistry.from_settings(arguments).publish_built_in)
    return built


def deployment_plan(settings: Settings) -> ServeDeploySchema:
    """What `serve deploy` would be given for these settings: only so can an application have a policy of its own."""
    return ServeDeploySchema(
        proxy_location=ProxyLocation.Disabled,
        applications=[
            ServeApplicationSchema(
                name=APPLICATION,
                route_prefix=None,
                import_path=f"{__name__}:{build.__name__}",
                args=settings.model_dump(mode="json", exclude_defaults=True),
                autoscaling_policy=elastic.scaling_policy(settings) if elastic.is_autoscaled(settings) else None,
                logging_config=QUIET,
            )
        ],
    )


def _patiently(step: Callable[[], None]) -> None:
    Retrying(
        retry=retry_if_exception_type(PolicyUnavailable),
        stop=stop_after_delay(_REACH_S),
        wait=wait_fixed(1),
        reraise=True,
    )(step)
