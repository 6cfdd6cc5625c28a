"""From measurements to a status: budgets, which are data with reasons, and the verdict."""
