"""Which stretch of which document stands where, decided from the table of documents alone."""
