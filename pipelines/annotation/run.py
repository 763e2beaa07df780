"""The order of a run of `sluice annotate`: find, list, index, plan, judge, publish, summarize; then curate."""

import asyncio
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import pyarrow as pa

from pipelines.annotation import chunks as plan
from pipelines.annotation import curate as curating
from pipelines.annotation import summary
from pipelines.annotation.chunks import AnnotationPlan
from pipelines.annotation.curate import Curated
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.partitions import publish
from pipelines.annotation.progress import StageProgress
from pipelines.annotation.reader import annotations, parts
from pipelines.annotation.sources import discover as sources
from pipelines.annotation.sources.discover import AnnotationSource, SourceShard
from pipelines.annotation.state import PAGE, STATE, SUMMARY, Listing, RunState
from pipelines.annotation.storage import folder, local_path
from services.core.errors import ConfigurationError, SluiceError
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.values import Policy
from services.policies.cache import PolicyCache
from services.policies.document import BUILT_IN
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry

Progress = Callable[[str], None]

APPLICATION: Final = "sluice-annotate"
_LOCAL_SHARDS_LIMIT: Final = 2


def annotate(options: AnnotateOptions, settings: Settings, progress: Progress) -> tuple[dict[str, Any], Curated | None]:
    """Do what is left to do of a run, whoever began it; its summary, and what was curated.

    Raises:
        ConfigurationError: the source, the folder to write to, the policy or the guard are not to be had.
        SluiceError: it could not be finished; the same call goes on from there.
    """
    out = _place(options.out)
    run = RunState(folder(out, settings))
    _check_apart(options, out, settings)
    source = sources.find(options.source, settings, kind=options.kind, column=options.column)
    with _exclusive_lock(out):
        policy = asyncio.run(_policy(_pinned(options.policy, run), settings))
        run.begin(
            {
                "source": source.uri,
                "kind": source.kind,
                "column": source.column,
                "policy": f"{policy.identity.name}@{policy.identity.version}",
                "digest": policy.identity.digest,
                "calibrations": {revision: each.digest for revision, each in sorted(policy.calibrations.items())},
                "model": settings.model,
                "chunk_rows": options.chunk_rows,
            }
        )
        done = run.summary()
        if done is None:
            done = _finish(run, source, policy, options, settings, progress)
        else:
            progress(f"{run.folder.uri} is complete")
        run.delete_temporary()
        return done, _curate(run, source, options, settings, progress) if options.wanted and options.curated else None


def _place(place: str) -> str:
    return place.rstrip("/") if place.startswith("s3://") else local_path(place).as_uri()


def _check_apart(options: AnnotateOptions, out: str, settings: Settings) -> None:
    """Whoever reads what is written would never come to an end."""
    source = _place(options.source)
    for name, place in (("--out", out), ("--curated", _place(options.curated) if options.curated else None)):
        if place and (f"{place}/".startswith(f"{source}/") or f"{source}/".startswith(f"{place}/")):
            raise ConfigurationError(f"{name} and the source lie in one another; say another {name}")
    if not settings.model:
        raise ConfigurationError("SLUICE_MODEL is not set; name a checkpoint, or `tiny` for a try")


@contextmanager
def _exclusive_lock(out: str) -> Iterator[None]:
    """Nobody else on this machine works in a folder of this machine. In a bucket two would only waste their time."""
    if not sources.is_local(out):
        yield
        return
    state = local_path(out) / STATE
    try:
        fresh = not state.parent.exists() or not any(state.parent.iterdir())
        if not fresh and not state.exists():
            yield  # `begin` says what is wrong with it
            return
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"another `sluice annotate` is writing to {out}; wait for its end") from None
        yield


def _pinned(reference: str, run: RunState) -> str:
    """The version that the run began with, where only a name is given: the active one may have changed meanwhile."""
    begun = (run.about() or {}).get("policy", "")
    is_same_name = begun and reference == PolicyReference.parse(begun).name
    return begun if is_same_name else reference


async def _policy(reference: str, settings: Settings) -> Policy:
    """A version, calibrated as the service has it; without a policy bucket, the built-in one."""
    if not settings.policy_bucket:
        if reference in (BUILT_IN.name, f"{BUILT_IN.name}@1"):
            return BUILT_IN.as_version(1)
        raise ConfigurationError(f"SLUICE_POLICY_BUCKET is not set, so there is only {BUILT_IN.name}, not {reference}")
    async with PolicyCache(PolicyRegistry.from_settings(settings), None) as policies:
        if PolicyReference.parse(reference).version is not None:
            return await policies.resolve(reference)
        # The tenant's policy counts as for a submission that names none.
        return (await policies.choose(Submission(id=reference, uri="s3://-/-", policy=reference))).policy


def _finish(
    run: RunState,
    source: AnnotationSource,
    policy: Policy,
    options: AnnotateOptions,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    from pipelines.annotation import ray_workers as cluster  # noqa: PLC0415 - it takes Ray, and the rest does not
    from pipelines.annotation.workers import IndexWorker, Job, JudgeWorker  # noqa: PLC0415

    listing = _listing(run, source, settings, progress)
    local = sources.is_local(source.place)
    root = local_path(options.root) if options.root else local_path(source.place) if local else None
    job = Job(settings, _place(options.out), source, listing, root)
    here = root is not None or sources.is_local(job.out)
    with cluster.joined(settings, progress):
        todo = run.plan()
        if todo is None:
            left = sorted(set(range(listing.shards)) - run.done("index"))
            placement = cluster.Placement(options.workers or 1, here)
            with StageProgress("indexed", None, progress) as stage:
                few = len(left) <= _LOCAL_SHARDS_LIMIT
                run_units = partial(cluster.run_units, placement=placement) if not few else cluster.run_here
                for word in run_units(IndexWorker, {"job": job}, left):
                    stage.add(word["rows"])
            todo = _plan(run, listing, options.chunk_rows, progress)
        left = sorted(set(range(todo.chunks)) - run.done("chunks"))
        judged = min((todo.chunks - len(left)) * todo.chunk_rows, todo.rows)
        name = f"{APPLICATION}-{hashlib.sha256(job.out.encode()).hexdigest()[:8]}"
        with ExitStack() as stack:
            if left:
                pool = stack.enter_context(
                    cluster.guard(settings, name, options.replicas, options.share_guard, progress)
                )
                placement = cluster.Placement(options.workers or pool.replicas, here)
                arguments = {"job": job, "policy": policy, "application": pool.application}
                counting = stack.enter_context(StageProgress("judged", todo.rows, progress, done=judged))
                for word in cluster.run_units(JudgeWorker, arguments, left, placement):
                    counting.add(word["rows"])
    with StageProgress("published", todo.rows, progress) as stage:
        publish(run, todo.chunks, stage.add)
    return _summarize(run, source, policy, todo)


def _listing(run: RunState, source: AnnotationSource, settings: Settings, progress: Progress) -> Listing:
    listing = run.listing()
    if listing is None:
        with StageProgress("listed", None, progress) as stage:

            def counted() -> Iterator[SourceShard]:
                for shard in sources.shards(source, settings):
                    stage.add(len(shard.names))
                    yield shard

            listing = run.keep_listing(counted(), sources.extra_fields(source, settings))
    if listing.shards == 0:
        raise ConfigurationError(f"there is nothing to annotate at {source.uri}: what it holds is empty")
    return listing


def _plan(run: RunState, listing: Listing, chunk_rows: int | None, progress: Progress) -> AnnotationPlan:
    def index() -> Iterator[pa.Table]:
        for number in range(listing.shards):
            if (rows := run.rows("index", f"{number:06d}")) is None:
                raise SluiceError(f"the index of {run.folder.uri} is not complete; start the same command again")
            yield from rows

    with StageProgress("planned", None, progress) as stage:

        def keep(name: str, rows: int, parquet: bytes) -> None:
            run.keep("plan", name, parquet)
            stage.add(rows)

        todo = plan.make(index, listing.extras, keep, chunk_rows)
    if todo.rows == 0:
        raise ConfigurationError("there is no image in the source")
    run.keep_plan(todo)
    progress(
        f"{todo.rows:,} images, {todo.duplicates:,} of them with the bytes of another, {todo.unreadable:,} unreadable"
    )
    return todo


def _summarize(run: RunState, source: AnnotationSource, policy: Policy, todo: AnnotationPlan) -> dict[str, Any]:
    counts = summary.Counts()
    for name in parts(run.folder):
        for rows in annotations(run.folder, name, summary.COLUMNS):
            counts.add(rows)
    if counts.rows != todo.rows:
        raise SluiceError(
            f"{run.folder.uri} holds {counts.rows} annotations of {todo.rows} images; something else wrote there"
        )
    identity = policy.identity
    done = {"source": source.uri, "policy": f"{identity.name}@{identity.version}", **counts.to_json()}
    run.folder.put(PAGE, summary.page(done).encode())
    run.folder.put(SUMMARY, json.dumps(done, indent=1).encode())
    return done


def _curate(
    run: RunState, source: AnnotationSource, options: AnnotateOptions, settings: Settings, progress: Progress
) -> Curated:
    assert options.wanted is not None
    assert options.curated is not None
    into = folder(_place(options.curated), settings)
    curating.begin(into, {"annotations": run.folder.uri, "filter": options.wanted.text, "as": options.curated_format})
    with StageProgress("curated", None, progress) as stage:
        if options.curated_format == "references":
            return curating.references(run.folder, options.wanted, into, stage.add)

        async def write() -> Curated:
            images = ImageReader(settings, source)
            try:
                return await curating.tars(run.folder, options.wanted, into, images, stage.add)  # type: ignore[arg-type]
            finally:
                images.close()

        return asyncio.run(write())
