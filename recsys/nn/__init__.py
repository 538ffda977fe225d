"""The parts of a model: tables, selection, sequences, interactions, head."""
