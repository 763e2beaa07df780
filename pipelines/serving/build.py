"""The application as `serve deploy` and KubeRay build it: `pipelines.serving.build:build`, with typed arguments."""

from typing import Final

from pydantic_settings import SettingsConfigDict
from ray.serve import Application
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pipelines.autoscaling import serve_config
from pipelines.serving.app import bind_application
from pipelines.serving.log_config import LOGGING_CONFIG
from pipelines.serving.names import APPLICATION
from services.core.retry import retry_blocking
from services.core.settings import Settings, require
from services.policies.registry import PolicyRegistry

_GUARD_GPUS: Final = 1.0
"""GPUs of a guard replica without the setting `guard_gpus`. The build cannot count the GPUs of nodes that start on
demand."""
_POLICY_BUCKET_DEADLINE_S: Final = 60.0
"""How long the build is retried while the policy bucket is down. Serve does not repeat a failed build."""


class ApplicationArguments(Settings):
    """The application's `args`: each setting by its name in lower case, without the prefix SLUICE_.

    A setting without an argument is read from the environment of the node that builds. An unknown name is an error, so
    that a misspelled setting is found before anything is deployed.
    """

    model_config = SettingsConfigDict(extra="forbid")


def build(arguments: ApplicationArguments) -> Application:
    """Check the settings, publish the built-in policy if the bucket has none, and build the application.

    Raises:
        ConfigurationError: a setting is missing, SLUICE_MODEL names no checkpoint, or there is no policy bucket.
        PolicyUnavailable: the policy bucket did not answer within a minute.
    """
    require(arguments)
    gpus = _GUARD_GPUS if arguments.guard_gpus is None else arguments.guard_gpus
    built = bind_application(arguments, guard_gpus=gpus)
    retry_blocking(PolicyRegistry.from_settings(arguments).publish_built_in, within_s=_POLICY_BUCKET_DEADLINE_S)
    return built


def make_deploy_schema(settings: Settings) -> ServeDeploySchema:
    """Return the configuration for `serve deploy`. Only with it can an application have its own autoscaling policy."""
    return ServeDeploySchema(
        proxy_location=ProxyLocation.Disabled,
        applications=[
            ServeApplicationSchema(
                name=APPLICATION,
                route_prefix=None,
                import_path=f"{__name__}:{build.__name__}",
                args=settings.model_dump(mode="json", exclude_defaults=True),
                autoscaling_policy=serve_config.make_autoscaling_policy(settings)
                if serve_config.is_autoscaled(settings)
                else None,
                logging_config=LOGGING_CONFIG,
            )
        ],
    )
