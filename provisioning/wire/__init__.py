"""Messages of EST, MQTT and RFC 9457, in both directions, without I/O."""
