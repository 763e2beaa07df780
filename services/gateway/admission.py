"""Admits requests: all limits of one gateway, in the order in which they are applied.

    1. rate                  images a second of one API key, in all gateways together      rate_limits.py
    2. concurrent requests   of one API key, each with the images that it judges at a time rate_limits.py
    3. body memory           bytes of all bodies; one API key gets a quarter               body_memory.py
    4. jobs                  assessments of one API key that are being judged              rate_limits.py
    5. images in flight      that this gateway judges at a time; one API key gets a quarter  load_shedding.py

`Admission.admit` applies the first two before anything of the body is read. `AdmittedRequest` applies the others
when it needs them: memory as the body arrives, a job for an assessment, and a place in flight for each image. Cheap
checks come first, so that a flood costs little. No limit makes a request wait, because a waiting request would hold
memory and slots that others need.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from services.core.messages import Verdict
from services.core.tenancy import Scope, Tenancy
from services.core.values import Detail
from services.gateway.api_keys import ApiKey, Role
from services.gateway.body_memory import BodyMemory, MemoryLease
from services.gateway.load_shedding import BoundedModerator
from services.gateway.problems import HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.gateway.submitted_images import SubmittedImage


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one gateway."""

    limiter: RateLimiter
    memory: BodyMemory
    moderator: BoundedModerator
    tenancy: Tenancy

    @asynccontextmanager
    async def admit(self, api_key: ApiKey, role: Role) -> "AsyncIterator[AdmittedRequest]":
        """Count one request of an API key until the block ends.

        Raises:
            HttpProblem: the API key is over its rate, lacks the role, or has too many concurrent requests.
        """
        await self.limiter.acquire(api_key)
        if not api_key.allows(role):
            raise HttpProblem(
                "not-permitted",
                f"this request needs the role {role}, but the API key {api_key.name!r} has the role {api_key.role}",
            )
        with self.limiter.concurrency_slot(api_key, "requests"), ExitStack() as resources:
            memory = resources.enter_context(self.memory.lease(api_key.id))
            yield AdmittedRequest(api_key, memory, resources, self)


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that is within the first two limits. It applies the other limits."""

    api_key: ApiKey
    memory: MemoryLease
    """Memory for the body and the images. Released when the request ends or, after `start_job`, when the job ends."""
    _resources: ExitStack
    _limits: Admission

    @property
    def scope(self) -> Scope:
        """The objects and policies that the API key may use."""
        return self.api_key.find_scope(self._limits.tenancy)

    def start_job(self) -> ExitStack:
        """Count a job, which may outlive the request. Close the result when the job ends; it also holds the memory.

        Raises:
            HttpProblem: the API key has too many jobs. The memory is released.
        """
        with self._resources:
            self._resources.enter_context(self._limits.limiter.concurrency_slot(self.api_key, "jobs"))
            return self._resources.pop_all()

    async def count_images(self, images: int, at_once: int) -> int:
        """Count the images of this request; admission counted the first. Returns how many it may judge at a time.

        Never refuses the request. More images delay the next requests of the API key, by its rate. Each image at a
        time beyond the first takes one of the key's concurrent requests, as long as one is free.
        """
        limiter = self._limits.limiter
        await limiter.charge(self.api_key, images - 1)
        slots = 1
        while slots < min(images, at_once):
            try:
                self._resources.enter_context(limiter.concurrency_slot(self.api_key, "requests"))
            except HttpProblem:
                break
            slots += 1
        return slots

    async def judge(self, image: SubmittedImage, detail: Detail = "verdict") -> Verdict:
        """Judge one image. Raises what `BoundedModerator.judge` raises."""
        return await self._limits.moderator.judge(image, self.api_key.id, self.scope, detail)
