"""The application as `serve deploy` and KubeRay build it: `pipelines.serving.build:build`, with typed arguments."""

import logging
import os
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from ray.serve import Application
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pipelines.autoscaling import serve_config
from pipelines.serving.app import bind_application
from pipelines.serving.log_config import LOGGING_CONFIG
from pipelines.serving.names import APPLICATION
from services.core.errors import ConfigurationError
from services.core.retry import retry_blocking
from services.core.settings import Settings, require
from services.policies.registry import PolicyRegistry

_GUARD_GPUS: Final = 1.0
"""GPUs of a guard replica without the setting `guard_gpus`. The build cannot count the GPUs of nodes that start on
demand."""
_POLICY_BUCKET_DEADLINE_S: Final = 60.0
"""How long the build is retried while the policy bucket is down. Serve does not repeat a failed build."""
_URLS: Final = ("stream_url", "redis_url", "s3_endpoint")

logger = logging.getLogger(__name__)


class ApplicationArguments(Settings):
    """The application's `args`: each setting by its name in lower case, without the prefix SLUICE_.

    A setting without an argument is read from the environment of the node that builds. An unknown name is an error, so
    that a misspelled setting is found before anything is deployed.
    """

    # A misspelled setting may hold a password, and Serve shows the error.
    model_config = SettingsConfigDict(extra="forbid", hide_input_in_errors=True)

    from_environment: tuple[str, ...] = Field(
        (), description="settings with credentials, which the environment of the node that builds must have"
    )


def build(arguments: ApplicationArguments) -> Application:
    """Check the settings, publish the built-in policy if the bucket has none, and build the application.

    Raises:
        ConfigurationError: a setting is missing, SLUICE_MODEL names no checkpoint, or there is no policy bucket.
        PolicyUnavailable: the policy bucket did not answer within a minute.
    """
    _check_environment(arguments)
    require(arguments)
    gpus = _GUARD_GPUS if arguments.guard_gpus is None else arguments.guard_gpus
    built = bind_application(arguments, guard_gpus=gpus)
    retry_blocking(PolicyRegistry.from_settings(arguments).publish_built_in, within_s=_POLICY_BUCKET_DEADLINE_S)
    return built


def _check_environment(arguments: ApplicationArguments) -> None:
    """Reject a missing setting with credentials, and warn of credentials in `args`."""
    if missing := [_to_variable(n) for n in arguments.from_environment if not os.environ.get(_to_variable(n))]:
        raise ConfigurationError(
            f"{', '.join(missing)} not set on the node that builds the application; set them in the environment of the "
            "head, because Ray shows the application's args and so they hold no credentials"
        )
    for name in list_credentials(arguments):
        if not os.environ.get(_to_variable(name)):
            logger.warning(
                "the argument %s holds credentials, and Ray's dashboard shows it; set %s in the environment of the "
                "head instead",
                name,
                _to_variable(name),
            )


def _to_variable(name: str) -> str:
    return f"SLUICE_{name.upper()}"


def list_credentials(settings: Settings) -> list[str]:
    """Return the names of the settings that hold credentials: URLs with a user or a query, and Kafka options."""
    found = [name for name in _URLS if _has_credentials(getattr(settings, name) or "")]
    return found + (["kafka_options"] if settings.kafka_options else [])


def _has_credentials(url: str) -> bool:
    parts = urlsplit(url)
    return "@" in parts.netloc or bool(parts.query)  # redis-py reads a password from the query, too


def _make_arguments(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from their defaults, without credentials: Ray shows the application's `args`."""
    withheld = list_credentials(settings)
    arguments = settings.model_dump(mode="json", exclude_defaults=True, exclude=set(withheld))
    return arguments | ({"from_environment": withheld} if withheld else {})


def make_deploy_schema(settings: Settings) -> ServeDeploySchema:
    """Return the configuration for `serve deploy`. Only with it can an application have its own autoscaling policy.

    It holds no credentials. The node that builds the application reads them from its environment.
    """
    return ServeDeploySchema(
        proxy_location=ProxyLocation.Disabled,
        applications=[
            ServeApplicationSchema(
                name=APPLICATION,
                route_prefix=None,
                import_path=f"{__name__}:{build.__name__}",
                args=_make_arguments(settings),
                autoscaling_policy=serve_config.make_autoscaling_policy(settings)
                if serve_config.is_autoscaled(settings)
                else None,
                logging_config=LOGGING_CONFIG,
            )
        ],
    )
