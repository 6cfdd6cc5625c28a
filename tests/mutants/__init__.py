"""Power and false alarms: single-place defects that the suite must catch, and clean models that it must leave alone."""
