"""A guard whose answers a test scripts. It is for faults and load only; tests of the model use the engine."""

from collections.abc import Awaitable, Callable, Sequence

from services.core.values import NO_CATEGORY, Assessment, Detail, ModelIdentity, Policy, PreparedImage, Priority

MODEL = ModelIdentity(name="scripted", revision="sha256:0", engine="none", prompt="sha256:1")


async def says_safe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return Assessment(rating="Safe", category=NO_CATEGORY, rationale=None, score=0.02, model=MODEL)


class FakeGuard:
    """Runs `script(image, detail)` for every assessment and counts them."""

    def __init__(self, script: Callable[[PreparedImage, Detail], Awaitable[Assessment]] = says_safe) -> None:
        self.script = script
        self.calls: list[Detail] = []

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: Priority
    ) -> list[Assessment]:
        self.calls += [detail] * len(policies)
        return [await self.script(image, detail) for _ in policies]
