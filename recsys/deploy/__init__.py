"""From a trained model to scores elsewhere: the bundle, what reads it without torch, and what writes it."""
