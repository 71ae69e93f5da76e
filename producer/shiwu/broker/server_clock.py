"""The clock of the Redis server, which all clients and workers share."""

from __future__ import annotations

import redis


def server_time_ms(client: redis.Redis) -> float:
    """The server's clock in milliseconds since 1970, with microseconds as decimals; one round trip.

    Raises:
        redis.RedisError: Redis is unavailable.
    """
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds / 1000
