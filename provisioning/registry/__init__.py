"""What is remembered: devices, credentials, tokens, changes, audit events."""
