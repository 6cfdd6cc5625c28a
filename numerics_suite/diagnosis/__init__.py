"""From a breach to a finding: the cause, the place, and the remedies that apply."""
