"""Moving planned bytes from files to an arena."""
