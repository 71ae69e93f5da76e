"""The clock of the Redis server, which all clients and workers share."""

from __future__ import annotations

import redis

from shiwu.broker.steps import Steps, run


def server_time_steps() -> Steps[float]:
    """Ask for the server's clock in milliseconds since 1970, with microseconds as decimals."""
    seconds, microseconds = yield lambda client: client.time()
    return float(seconds * 1000 + microseconds / 1000)


def server_time_ms(client: redis.Redis) -> float:
    """The server's clock in milliseconds since 1970, with microseconds as decimals; one round trip.

    Raises:
        redis.RedisError: Redis is unavailable.
    """
    return run(client, server_time_steps())
