"""The workers of a run: one kind indexes shards, the other judges chunks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ray import serve

from pipelines.annotation.chunk_judge import ChunkJudge
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.index import Indexer
from pipelines.annotation.ray_workers import WorkResult
from pipelines.annotation.resume_state import Listing, RunState
from pipelines.annotation.schema import to_parquet
from pipelines.annotation.sources.discover import AnnotationSource, is_local
from pipelines.annotation.storage import open_folder
from pipelines.serving.guard_client import ServeGuardClient
from pipelines.serving.names import GUARD
from services.core.errors import StoreUnavailable
from services.core.logs import configure_logging
from services.core.retry import retry_while_unavailable
from services.core.settings import Settings
from services.core.values import Policy
from services.images.decoder_pool import DecoderPool

_STORE_TIMEOUT_S: Final = 300.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The settings and the source of a run. All workers of the run get the same."""

    settings: Settings
    out: str
    source: AnnotationSource
    listing: Listing
    root: Path | None
    """The folder whose files a list of references may name."""

    @property
    def is_local_only(self) -> bool:
        """Whether workers have to run on this machine, because the images or the output are local files."""
        return self.root is not None or is_local(self.out)

    def open_state(self) -> RunState:
        """The state of the run."""
        return RunState(open_folder(self.out, self.settings))


class IndexWorker:
    """Indexes shards."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._state = config.open_state()
        self._indexer = Indexer(config.source, config.listing.source_columns, config.settings, config.root)

    async def work(self, number: int) -> WorkResult:
        """Index a shard and store the rows."""
        shard = await _call_store(self._state.read_shard, self._config.listing, number)
        table = await self._indexer.index(shard)
        await _call_store(self._state.save_table, "index", f"{number:06d}", to_parquet(table))
        return {"number": number, "rows": table.num_rows}


class JudgeWorker:
    """Judges chunks with a guard of the cluster."""

    def __init__(self, config: WorkerConfig, policy: Policy, application: str) -> None:
        configure_logging(None)
        self._config = config
        self._policy = policy
        self._state = config.open_state()
        handle: Any = serve.get_deployment_handle(GUARD, application)
        self._guard = ServeGuardClient.from_settings(handle, config.settings)
        self._starting = asyncio.Lock()
        self._judge: ChunkJudge | None = None

    async def work(self, number: int) -> WorkResult:
        """Judge a chunk and store its annotations."""
        judge = await self._open_judge()
        planned = await _call_store(self._state.read_planned, number)
        annotations = await judge.judge(planned, self._config.listing.source_columns)
        await _call_store(self._state.save_table, "chunks", f"{number:06d}", annotations.finish())
        return {"number": number, "rows": annotations.rows}

    async def _open_judge(self) -> ChunkJudge:
        async with self._starting:
            if self._judge is None:
                settings = self._config.settings
                self._judge = ChunkJudge(
                    images=ImageReader(settings, self._config.source),
                    # The guard may be that of a running service, whose checkpoint these settings do not name.
                    preparer=DecoderPool(settings, await self._guard.max_side_px()),
                    guard=self._guard,
                    policy=self._policy,
                    in_flight=settings.in_flight,
                )
            return self._judge


async def _call_store(function: Callable[..., T], *arguments: Any) -> T:
    """Read or write a file of the run. Retries for a while if the store is unavailable."""
    try:
        return await retry_while_unavailable(lambda: asyncio.to_thread(function, *arguments), within_s=_STORE_TIMEOUT_S)
    except TimeoutError:
        raise StoreUnavailable(
            f"the object store has not answered for {_STORE_TIMEOUT_S:g} s; run the command again to resume"
        ) from None
