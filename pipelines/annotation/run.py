"""The steps of `sluice annotate`: find the source, list, index, plan, judge, publish, summarize, and curate."""

import asyncio
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from pipelines.annotation.annotation_files import list_partition_files, read_annotations
from pipelines.annotation.chunks import AnnotationPlan, plan_chunks
from pipelines.annotation.curate import CuratedSet, claim_folder, write_references, write_tars
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.partitions import publish_partitions
from pipelines.annotation.resume_state import PAGE, STATE, SUMMARY, Listing, RunState
from pipelines.annotation.sources.discover import (
    AnnotationSource,
    SourceShard,
    find_source,
    is_local,
    list_shards,
    read_source_columns,
)
from pipelines.annotation.stage_progress import StageProgress
from pipelines.annotation.storage import local_path, open_folder
from pipelines.annotation.summary import SUMMARY_COLUMNS, SummaryCounts, render_page
from services.core.errors import ConfigurationError, SluiceError
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.values import Policy
from services.policies.cache import PolicyCache
from services.policies.document import BUILT_IN
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry

if TYPE_CHECKING:
    from pipelines.annotation.workers import WorkerConfig

Progress = Callable[[str], None]

ANNOTATE_APPLICATION: Final = "sluice-annotate"
_IN_PROCESS_SHARDS: Final = 2
"""So few shards are indexed in this process, because it would take longer to start workers."""


def annotate(
    options: AnnotateOptions, settings: Settings, progress: Progress
) -> tuple[dict[str, Any], CuratedSet | None]:
    """Start a run, or resume the one in the output folder. Returns the summary and the curated set, if one is wanted.

    Raises:
        ConfigurationError: the source, the output folder, the policy or the guard is not usable.
        SluiceError: the run could not finish; the same call resumes it.
    """
    out = _to_uri(options.out)
    state = RunState(open_folder(out, settings))
    _check_options(options, out, settings)
    source = find_source(
        options.source,
        settings,
        kind=options.source_kind,
        column=options.column,
        root=local_path(options.root) if options.root else None,
    )
    with _exclusive_lock(out):
        policy = asyncio.run(_resolve_policy(_pin_version(options.policy, state), settings))
        state.begin(_describe(source, policy, options, settings))
        summary = state.read_summary()
        if summary is None:
            summary = _RunSteps(state, source, policy, options, settings, progress).finish()
        else:
            progress(f"{state.folder.uri} is complete")
        state.delete_temporary()
        return summary, _curate(state, source, options, settings, progress)


def _to_uri(location: str) -> str:
    return location.rstrip("/") if location.startswith("s3://") else local_path(location).as_uri()


def _check_options(options: AnnotateOptions, out: str, settings: Settings) -> None:
    """
    Raises:
        ConfigurationError: an output folder overlaps the source, so the run would read its own output; or no model is
            set.
    """
    source = _to_uri(options.source)
    for name, uri in (("--out", out), ("--curated", _to_uri(options.curated) if options.curated else None)):
        if uri and (f"{uri}/".startswith(f"{source}/") or f"{source}/".startswith(f"{uri}/")):
            raise ConfigurationError(f"{name} is inside the source or contains it; name another folder with {name}")
    if not settings.model:
        raise ConfigurationError("SLUICE_MODEL is not set; name a checkpoint, or `tiny` to try the command")


@contextmanager
def _exclusive_lock(out: str) -> Iterator[None]:
    """Lock a local output folder against other runs. Two runs in a bucket are safe: they only do the work twice."""
    if not is_local(out):
        yield
        return
    state = local_path(out) / STATE
    try:
        fresh = not state.parent.exists() or not any(state.parent.iterdir())
        if not fresh and not state.exists():
            yield  # `RunState.begin` reports that the folder has other files
            return
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"another `sluice annotate` is writing to {out}; wait until it has ended, or name another folder"
            ) from None
        yield


def _pin_version(reference: str, state: RunState) -> str:
    """The version that the run began with if only a name is given, because the active version may have changed."""
    stored = (state.read_description() or {}).get("policy", "")
    is_same_name = stored and reference == PolicyReference.parse(stored).name
    return stored if is_same_name else reference


async def _resolve_policy(reference: str, settings: Settings) -> Policy:
    """A policy version with the service's calibration. Without a policy bucket there is only the built-in version."""
    if not settings.policy_bucket:
        if reference in (BUILT_IN.name, f"{BUILT_IN.name}@1"):
            return BUILT_IN.as_version(1)
        raise ConfigurationError(f"SLUICE_POLICY_BUCKET is not set, so there is only {BUILT_IN.name}, not {reference}")
    async with PolicyCache(PolicyRegistry.from_settings(settings), None) as policies:
        if PolicyReference.parse(reference).version is not None:
            return await policies.resolve(reference)
        # As for a submission that names no policy, the tenant's policy is used.
        return (await policies.choose(Submission(id=reference, uri="s3://-/-", policy=reference))).policy


def _describe(source: AnnotationSource, policy: Policy, options: AnnotateOptions, settings: Settings) -> dict[str, Any]:
    """The description of a run. Only a run with the same description resumes it."""
    return {
        "source": source.uri,
        "kind": source.kind,
        "column": source.column,
        "policy": f"{policy.identity.name}@{policy.identity.version}",
        "digest": policy.identity.digest,
        "calibrations": {revision: each.digest for revision, each in sorted(policy.calibrations.items())},
        "model": settings.model,
        "chunk_rows": options.chunk_rows,
    }


@dataclass(frozen=True, slots=True)
class _RunSteps:
    """The steps from the listing of the source to the summary. Each skips the work that is already stored."""

    state: RunState
    source: AnnotationSource
    policy: Policy
    options: AnnotateOptions
    settings: Settings
    progress: Progress

    def finish(self) -> dict[str, Any]:
        from pipelines.annotation import ray_workers  # noqa: PLC0415 - it imports Ray, and a complete run needs none

        listing = self._list()
        config = self._make_config(listing)
        with ray_workers.join_cluster(self.settings, self.progress):
            plan = self.state.read_plan()
            if plan is None:
                self._index(config)
                plan = self._plan(listing)
            self._judge(config, plan)
        with StageProgress("published", plan.rows, self.progress) as stage:
            publish_partitions(self.state, plan.chunks, stage.add)
        return self._summarize(plan)

    def _list(self) -> Listing:
        listing = self.state.read_listing()
        if listing is None:
            with StageProgress("listed", None, self.progress) as stage:

                def counted() -> Iterator[SourceShard]:
                    for shard in list_shards(self.source, self.settings):
                        stage.add(len(shard.names))
                        yield shard

                listing = self.state.save_listing(counted(), read_source_columns(self.source, self.settings))
        if listing.shards == 0:
            raise ConfigurationError(f"there is nothing to annotate at {self.source.uri}: all files are empty")
        return listing

    def _make_config(self, listing: Listing) -> "WorkerConfig":
        from pipelines.annotation.workers import WorkerConfig  # noqa: PLC0415

        is_source_local = is_local(self.source.folder_uri)
        root = self.options.root or (self.source.folder_uri if is_source_local else None)
        return WorkerConfig(
            self.settings, _to_uri(self.options.out), self.source, listing, local_path(root) if root else None
        )

    def _index(self, config: "WorkerConfig") -> None:
        from pipelines.annotation import ray_workers  # noqa: PLC0415
        from pipelines.annotation.workers import IndexWorker  # noqa: PLC0415

        remaining = sorted(set(range(config.listing.shards)) - self.state.list_finished("index"))
        with StageProgress("indexed", None, self.progress) as stage:
            if len(remaining) <= _IN_PROCESS_SHARDS:
                results = ray_workers.run_in_process(IndexWorker, {"config": config}, remaining)
            else:
                placement = ray_workers.Placement(self.options.workers or 1, config.is_local_only)
                results = ray_workers.run_on_workers(IndexWorker, {"config": config}, remaining, placement)
            for result in results:
                stage.add(result["rows"])

    def _plan(self, listing: Listing) -> AnnotationPlan:
        def read_index() -> Iterator[pa.Table]:
            for number in range(listing.shards):
                if (rows := self.state.read_table("index", f"{number:06d}")) is None:
                    raise SluiceError(
                        f"the index of {self.state.folder.uri} is not complete; run the same command again"
                    )
                yield from rows

        with StageProgress("planned", None, self.progress) as stage:

            def write(name: str, rows: int, parquet: bytes) -> None:
                self.state.save_table("plan", name, parquet)
                stage.add(rows)

            plan = plan_chunks(read_index, listing.source_columns, write, self.options.chunk_rows)
        if plan.rows == 0:
            raise ConfigurationError(f"there is no image in {self.source.uri}; name another source")
        self.state.save_plan(plan)
        self.progress(f"{plan.rows:,} images, {plan.duplicates:,} of them duplicates, {plan.unreadable:,} unreadable")
        return plan

    def _judge(self, config: "WorkerConfig", plan: AnnotationPlan) -> None:
        from pipelines.annotation import ray_workers  # noqa: PLC0415
        from pipelines.annotation.workers import JudgeWorker  # noqa: PLC0415

        remaining = sorted(set(range(plan.chunks)) - self.state.list_finished("chunks"))
        if not remaining:
            return
        judged = min((plan.chunks - len(remaining)) * plan.chunk_rows, plan.rows)
        name = f"{ANNOTATE_APPLICATION}-{hashlib.sha256(config.out.encode()).hexdigest()[:8]}"
        options = self.options
        with (
            ray_workers.provide_guard(
                self.settings, name, options.replicas, options.share_guard, self.progress
            ) as pool,
            StageProgress("judged", plan.rows, self.progress, done=judged) as stage,
        ):
            placement = ray_workers.Placement(options.workers or pool.replicas, config.is_local_only)
            arguments = {"config": config, "policy": self.policy, "application": pool.application}
            for result in ray_workers.run_on_workers(JudgeWorker, arguments, remaining, placement):
                stage.add(result["rows"])

    def _summarize(self, plan: AnnotationPlan) -> dict[str, Any]:
        counts, out = SummaryCounts(), self.state.folder
        for name in list_partition_files(out):
            for rows in read_annotations(out, name, SUMMARY_COLUMNS):
                counts.add(rows)
        if counts.rows != plan.rows:
            raise SluiceError(
                f"{out.uri} has {counts.rows} annotations of {plan.rows} images, so another program has written or "
                "removed files there; use an empty folder"
            )
        identity = self.policy.identity
        summary = {
            "source": self.source.uri,
            "policy": f"{identity.name}@{identity.version}",
            **counts.to_json(),
        }
        out.put(PAGE, render_page(summary).encode())
        out.put(SUMMARY, json.dumps(summary, indent=1).encode())
        return summary


def _curate(
    state: RunState, source: AnnotationSource, options: AnnotateOptions, settings: Settings, progress: Progress
) -> CuratedSet | None:
    """Write the curated set, if the options ask for one."""
    row_filter = options.row_filter
    if row_filter is None or options.curated is None:
        return None
    into = open_folder(_to_uri(options.curated), settings)
    claim_folder(into, {"annotations": state.folder.uri, "filter": row_filter.text, "as": options.curated_format})
    with StageProgress("curated", None, progress) as stage:
        if options.curated_format == "references":
            return write_references(state.folder, row_filter, into, stage.add)

        async def write() -> CuratedSet:
            images = ImageReader(settings, source)
            try:
                return await write_tars(state.folder, row_filter, into, images, stage.add)
            finally:
                images.close()

        return asyncio.run(write())
