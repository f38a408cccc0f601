"""Words that everybody shares: names, states, refusals, errors."""
