"""What workers do with their units: index pieces, judge chunks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ray import serve

from pipelines.annotation.chunk_judge import ChunkJudge
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.index import Indexer
from pipelines.annotation.schema import to_parquet
from pipelines.annotation.sources.discover import AnnotationSource
from pipelines.annotation.state import Listing, RunState
from pipelines.annotation.storage import folder
from pipelines.serving.guard_client import RemoteGuard
from services.core.errors import StoreUnavailable
from services.core.retry import retry_while_unavailable
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.core.values import Policy
from services.images.decoder_pool import DecoderPool

_STORE_PATIENCE_S: Final = 300.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run needs to know."""

    settings: Settings
    out: str
    source: AnnotationSource
    listing: Listing
    root: Path | None
    """The folder below which files may be read that a list names."""

    def run(self) -> RunState:
        return RunState(folder(self.out, self.settings))


class IndexWorker:
    """Indexes pieces."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._run = job.run()
        self._indexer = Indexer(job.source, job.listing.extras, job.settings, job.root)

    async def work(self, unit: int) -> dict[str, int]:
        """Index a piece and keep that."""
        shard = await _kept(self._run.shard, self._job.listing, unit)
        table = await self._indexer.index(shard)
        await _kept(self._run.keep, "index", f"{unit:06d}", to_parquet(table))
        return {"unit": unit, "rows": table.num_rows}


class JudgeWorker:
    """Judges chunks on a guard of the cluster."""

    def __init__(self, job: Job, policy: Policy, application: str) -> None:
        configure_logging(None)
        self._job = job
        self._policy = policy
        self._run = job.run()
        handle: Any = serve.get_deployment_handle("Guard", application)
        self._guard = RemoteGuard.from_settings(handle, job.settings)
        self._starting = asyncio.Lock()
        self._judge: ChunkJudge | None = None

    async def work(self, unit: int) -> dict[str, int]:
        """Judge a chunk and keep that."""
        judge = await self._started()
        planned = await _kept(self._run.planned, unit)
        annotations = await judge.judge(planned, self._job.listing.extras)
        await _kept(self._run.keep, "chunks", f"{unit:06d}", annotations.finish())
        return {"unit": unit, "rows": annotations.rows}

    async def _started(self) -> ChunkJudge:
        async with self._starting:
            if self._judge is None:
                settings = self._job.settings
                self._judge = ChunkJudge(
                    images=ImageReader(settings, self._job.source),
                    # The guard may be that of a running service, whose checkpoint these settings do not name.
                    preparer=DecoderPool(settings, await self._guard.max_side_px()),
                    guard=self._guard,
                    policy=self._policy,
                    in_flight=settings.in_flight,
                )
            return self._judge


async def _kept(work: Callable[..., T], *arguments: Any) -> T:
    """Read or write a file of the run. Retries for a while if the store is unavailable."""
    try:
        return await retry_while_unavailable(lambda: asyncio.to_thread(work, *arguments), within_s=_STORE_PATIENCE_S)
    except TimeoutError:
        raise StoreUnavailable("the object store does not answer") from None
