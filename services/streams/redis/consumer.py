"""The group consumer on Redis Streams (Redis 6.2 or later, Valkey).

An entry that a member has received stays *pending* for that member until it is acknowledged. A heartbeat renews the
entries that the member holds. If an entry is not renewed for `redis_claim_idle_s`, the next member that receives claims
it. Settling is one server-side script, which publishes and acknowledges only if this member still owns the entry. So
each output is published once per entry, however often members fail. The server's `appendfsync` sets its durability.

On Redis Cluster the streams need one hash tag, for example `{sluice}.submissions`.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final, Self

from redis import exceptions
from redis.asyncio import Redis

from services.core.errors import NotOwned
from services.core.retry import backoff
from services.core.tasks import cancel_and_wait
from services.streams.base import Lag, Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.redis import scripts
from services.streams.redis.client import (
    MAX_BACKOFF_S,
    decode_entry,
    encode_entry,
    is_missing_group,
    is_outage,
    map_error,
    open_client,
)

log = logging.getLogger(__name__)

_BLOCK_S: Final = 1.0
"""Length of one blocking read. Between two reads the member claims abandoned entries."""
_TRIM_S: Final = 60.0
_SILENT_S: Final = 60.0
"""A consumer without entries is deleted after it was silent for this long and for 4 times the claim time."""
_RENEW_BATCH: Final = 500
_CLOSE_S: Final = 5.0
_CLAIMABLE_IDLE_MS: Final = 1 << 40
"""An idle time that is longer than any claim time, so that other members claim the entries at once."""


class RedisGroupConsumer:
    """One member of a consumer group. See `GroupConsumer` for what the methods promise."""

    def __init__(self, config: StreamConfig, member: str, client: Redis) -> None:
        """Use `open`, which connects."""
        self._client = client
        self._stream = config.submissions_stream
        self._group = config.group
        # Each start of a member gets a new name, because it does not hold the entries of an earlier start.
        self._consumer = f"{member}-{uuid.uuid4().hex[:8]}"
        self._kept_streams = (
            config.submissions_stream,
            config.verdicts_stream,
            config.shadow_verdicts_stream,
        )
        self._retention_ms = int(config.redis_retention_s * 1000)
        self._claim_idle_ms = max(1, int(config.redis_claim_idle_s * 1000))
        self._held: set[bytes] = set()
        self._cursor: bytes = b"0-0"
        self._next_claim = 0.0
        self._next_trim = time.monotonic() + _TRIM_S
        self._closed = False
        self._settle, self._renew, self._claim, self._leave, self._delete_idle, self._trim, self._lag = (
            client.register_script(script)
            for script in (
                scripts.SETTLE,
                scripts.RENEW,
                scripts.CLAIM,
                scripts.LEAVE,
                scripts.DELETE_IDLE_CONSUMERS,
                scripts.TRIM,
                scripts.LAG,
            )
        )
        self._heartbeat = asyncio.create_task(self._renew_periodically(), name=f"redis-heartbeat-{member}")

    @classmethod
    async def open(cls, config: StreamConfig, member: str) -> Self:
        """Join the group; stream and group are created where they do not exist.

        Raises:
            ConfigurationError: the URL or the credentials are wrong, or the server is too old.
            StreamUnavailable: the server did not answer in time.
        """
        client = await open_client(config)
        try:
            await _create_group(client, config.submissions_stream, config.group)
        except Exception as error:
            await client.aclose(close_connection_pool=True)
            raise map_error(error) from error
        return cls(config, member, client)

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        """Abandoned entries first, then new ones, each in the order of their ids."""
        deadline = time.monotonic() + timeout_s
        delays = backoff(MAX_BACKOFF_S)
        while True:
            remaining = deadline - time.monotonic()
            try:
                batch = await self._claim_abandoned(max_messages) or await self._new(max_messages, remaining)
                delays = backoff(MAX_BACKOFF_S)
            except Exception as error:  # noqa: BLE001 - the member goes on after any error; _recover logs it
                await self._recover(error)
                batch = []
                await asyncio.sleep(min(next(delays), max(0.0, deadline - time.monotonic())))
            if batch:
                return batch
            if time.monotonic() >= deadline:
                return []

    async def settle(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        """Exactly one publication per entry, however often it is delivered."""
        keys = [self._stream, *(record.stream for record in records)]
        arguments: list[Any] = [self._group, self._consumer, message.token]
        for record in records:
            fields = encode_entry(record)
            arguments += [len(fields), *fields]
        if message.token not in self._held:
            raise NotOwned(f"{message.source} belongs to another member now.")
        unsure = False
        for delay in backoff(MAX_BACKOFF_S):
            if self._closed:
                raise NotOwned(f"{message.source} went to the other members when this one left.")
            try:
                outcome = await self._settle(keys=keys, args=arguments)
            except Exception as error:  # noqa: BLE001 - the message is retried after any error; _recover logs it
                # The answer may have been lost after the server did its work.
                unsure = unsure or isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError)
                await self._recover(error)
                await asyncio.sleep(delay)
                continue
            self._held.discard(message.token)
            if outcome == 1 or (outcome == -1 and unsure):
                return
            raise NotOwned(f"{message.source} belongs to another member now.")

    async def lag(self) -> Lag:
        """Entries not delivered yet and entries pending, for the whole group."""
        try:
            pending, waiting, published = await self._lag(keys=[self._stream], args=[self._group])
        except Exception as error:
            if is_missing_group(error):
                return Lag({0: 0})
            raise map_error(error) from error
        return Lag({0: int(pending) + int(waiting)}, published=int(published))

    def find_head_of_line_messages(self) -> Sequence[Message]:
        """Always empty: entries are acknowledged one by one, so none waits for another."""
        return ()

    async def close(self) -> None:
        """Make the held entries claimable at once, and disconnect. Gives up after 5 s if the server does not answer."""
        if self._closed:
            return
        self._closed = True
        await cancel_and_wait(self._heartbeat)
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._leave(keys=[self._stream], args=[self._group, self._consumer, _CLAIMABLE_IDLE_MS])
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            log.warning(
                "could not leave the group; its messages are reclaimed in %d ms: %s", self._claim_idle_ms, error
            )
        self._held.clear()
        await self._client.aclose(close_connection_pool=True)

    # ---- receiving

    async def _claim_abandoned(self, max_messages: int) -> list[Message]:
        """Claim entries that no member renews, once a second; more often while there are more."""
        if time.monotonic() < self._next_claim:
            return []
        cursor, entries = await self._claim(
            keys=[self._stream], args=[self._group, self._consumer, self._claim_idle_ms, self._cursor, max_messages]
        )
        self._cursor = cursor
        if cursor == b"0-0":
            self._next_claim = time.monotonic() + min(_BLOCK_S, self._claim_idle_ms / 3000)
        others = [entry for entry in entries if entry[0] not in self._held]
        return [self._hold(id_, fields, int(deliveries)) for id_, fields, deliveries in others]

    async def _new(self, max_messages: int, remaining_s: float) -> list[Message]:
        block_ms = max(1, int(min(remaining_s, _BLOCK_S, self._claim_idle_ms / 3000) * 1000))
        reply: Any = await self._client.xreadgroup(
            self._group, self._consumer, {self._stream: ">"}, count=max_messages, block=block_ms
        )
        return [self._hold(id_, fields, 1) for _, entries in reply or () for id_, fields in entries]

    def _hold(self, id_: bytes, fields: Sequence[bytes], attempts: int) -> Message:
        self._held.add(id_)
        return decode_entry(self._stream, id_, fields, attempts=attempts, token=id_)

    # ---- staying a member

    async def _renew_periodically(self) -> None:
        delays = backoff(MAX_BACKOFF_S)
        while True:
            await asyncio.sleep(self._claim_idle_ms / 3000)
            while True:
                try:
                    await self._renew_held()
                    if time.monotonic() >= self._next_trim:
                        self._next_trim = time.monotonic() + _TRIM_S
                        await self._delete_expired()
                    delays = backoff(MAX_BACKOFF_S)
                    break
                except Exception as error:  # noqa: BLE001 - the heartbeat must not end; _recover logs it
                    await self._recover(error)
                    await asyncio.sleep(next(delays))

    async def _renew_held(self) -> None:
        held = tuple(self._held)
        for at in range(0, len(held), _RENEW_BATCH):
            some = held[at : at + _RENEW_BATCH]
            lost = await self._renew(keys=[self._stream], args=[self._group, self._consumer, *some])
            self._held.difference_update(lost)

    async def _delete_expired(self) -> None:
        """Delete old settled entries, and the consumers of members that have ended. Dead letters are kept."""
        for stream in self._kept_streams:
            await self._trim(keys=[stream], args=[self._retention_ms])
        silent_ms = max(int(_SILENT_S * 1000), 4 * self._claim_idle_ms)
        await self._delete_idle(keys=[self._stream], args=[self._group, self._consumer, silent_ms])

    async def _recover(self, error: Exception) -> None:
        """Repair the connection or the group after a failed command. The caller waits and retries."""
        if isinstance(error, exceptions.ReadOnlyError):
            await self._client.connection_pool.disconnect(inuse_connections=False)  # find the new master
        if is_missing_group(error):
            log.warning("the consumer group %s does not exist any more; creating it again: %s", self._group, error)
            with contextlib.suppress(exceptions.RedisError, OSError):
                await _create_group(self._client, self._stream, self._group)
        elif is_outage(error):
            log.warning("Redis does not answer; retrying: %s", str(error) or type(error).__name__)
        else:
            log.error("Redis rejects a command; retrying: %s: %s", type(error).__name__, error)


async def _create_group(client: Redis, stream: str, group: str) -> None:
    try:
        await client.xgroup_create(stream, group, id="0", mkstream=True)
    except exceptions.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
