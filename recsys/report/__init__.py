"""What is told about a finished run."""
