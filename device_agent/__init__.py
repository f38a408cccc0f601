"""The agent: enrols a device on boot and rotates before anything expires."""
