"""The base of the models that reports are made of."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A model that cannot be changed and has no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
