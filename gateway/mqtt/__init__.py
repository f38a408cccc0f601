"""The relay between devices and the broker, and the rules it enforces."""
