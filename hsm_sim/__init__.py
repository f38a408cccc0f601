"""SoftHSM tokens for demos and tests, and ways to break them; never shipped."""
