"""The CA's life: hierarchy, issuing, recovery, revocation, publication."""
