class SessionLimits:
    """The limits of a server's sessions, see Limits in h2_stream.pxd; ValueError for a window beyond HTTP/2's."""

    def __init__(
        self,
        *,
        max_message_bytes: int = ...,
        max_concurrent_streams: int = ...,
        max_header_list_bytes: int = ...,
        stream_window_bytes: int = ...,
        connection_window_bytes: int = ...,
        max_buffered_bytes: int = ...,
        max_outbound_bytes: int = ...,
        high_water_bytes: int = ...,
    ) -> None: ...
