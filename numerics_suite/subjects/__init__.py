"""What is under test: parsing a SUBJECT, loading it at a precision, and what each family of models knows."""
