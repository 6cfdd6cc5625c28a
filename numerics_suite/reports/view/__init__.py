"""What a report says, in no format: which problems there are, where, since which version, what to do, and what is drawn."""
