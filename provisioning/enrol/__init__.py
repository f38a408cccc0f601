"""Who may have what, and the answer to a device that asks."""
