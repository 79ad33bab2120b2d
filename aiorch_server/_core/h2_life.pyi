class ConnectionRules:
    """What the connections of a server keep to; times in seconds, 0 is never."""

    def __init__(
        self,
        *,
        keepalive_time_s: float = ...,
        keepalive_timeout_s: float = ...,
        keepalive_permit_without_calls: bool = ...,
        min_ping_interval_s: float = ...,
        max_ping_strikes: int = ...,
        max_connection_idle_s: float = ...,
        max_connection_age_s: float = ...,
        max_connection_age_grace_s: float = ...,
        stall_timeout_s: float = ...,
        seed: int = ...,
    ) -> None: ...
