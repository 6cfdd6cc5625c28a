"""Records, registry and errors that every stage shares; standard library only."""
