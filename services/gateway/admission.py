"""Admits requests: all limits of one gateway, in the order in which a request meets them.

    1. rate                  requests a second of one API key, in all gateways together    rate_limits.py
    2. concurrent requests   of one API key                                                rate_limits.py
    3. body memory           bytes of all bodies; one API key gets a quarter               request_bodies.py
    4. jobs                  assessments of one API key that are being judged              rate_limits.py
    5. images in flight      at the guard, of all API keys                                 load_shedding.py

`Admission.admit` takes the first two before anything of the body is read. The admitted request takes the others when it
needs them: memory as the body arrives, a job for an assessment, and a slot at the guard for each image. Cheap checks
come first, so that a flood costs little. No limit makes a request wait: a waiting request would hold what others need.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from services.core.messages import Verdict
from services.core.values import Detail
from services.gateway.api_keys import ApiKey, Role
from services.gateway.image_inputs import Image
from services.gateway.load_shedding import LoadShedder
from services.gateway.problems import HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.gateway.request_bodies import BodyMemory, MemoryLease


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one gateway."""

    limiter: RateLimiter
    memory: BodyMemory
    shedder: LoadShedder

    @asynccontextmanager
    async def admit(self, key: ApiKey, role: Role) -> "AsyncIterator[AdmittedRequest]":
        """Count one request of a key until the block ends.

        Raises:
            HttpProblem: the key is over its rate, its role is less than `role`, or it has too many requests at a time.
        """
        await self.limiter.acquire(key)
        if not key.may(role):
            raise HttpProblem(
                "not-permitted", f"this request needs the role {role}; the API key {key.name!r} has the role {key.role}"
            )
        with self.limiter.concurrency_slot(key, "requests"), ExitStack() as held:
            yield AdmittedRequest(key, held.enter_context(self.memory.lease(key.id)), held, self)


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request within the limits so far, and what it takes of the next ones."""

    key: ApiKey
    memory: MemoryLease
    """Memory for the body and the images. It is released when the request ends or, after `start_job`, the job."""
    _held: ExitStack
    _limits: Admission

    def start_job(self) -> ExitStack:
        """Count a job, which may outlive the request. Close the result when the job ends: it holds the memory, too.

        Raises:
            HttpProblem: the key has too many jobs at a time. The memory is released.
        """
        with self._held:
            self._held.enter_context(self._limits.limiter.concurrency_slot(self.key, "jobs"))
            return self._held.pop_all()

    async def judge(self, image: Image, detail: Detail = "verdict") -> Verdict:
        """Judge one image at the guard; raises what `LoadShedder.judge` raises."""
        return await self._limits.shedder.judge(image, detail)
