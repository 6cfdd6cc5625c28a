"""What is under test: parsing a SUBJECT, loading it at a precision, and the families of models."""
