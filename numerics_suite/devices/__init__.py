"""The only folder that names devices: precisions, arithmetic switches, random states, memory, events."""
