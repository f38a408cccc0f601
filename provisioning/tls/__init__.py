"""TLS as a protocol without sockets, and the one asyncio transport over it."""
