"""The domain: names, policy, CA, registry, token seam, wire formats and TLS."""
