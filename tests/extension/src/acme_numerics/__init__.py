"""An extension of numerics-suite, small and whole: a check and its remedy, a family, a reporter."""
