"""Pre-shared keys: derivation in the token, generations, the short key cache."""
