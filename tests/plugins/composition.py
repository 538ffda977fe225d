"""The installed embeddings and interactions, and what they cannot be built without in a test."""

from recsys.plugin.registry import load_registry

REGISTRY = load_registry()
EMBEDDINGS = REGISTRY.names("embedding")
INTERACTIONS = REGISTRY.names("interaction")
OPTIONS = {
    "mde": {"alpha": 0.5},
    "qr": {"collisions": 4},
    "unified": {"rows": 64, "chunks": 2},
    "pep": {"threshold_init": -3.0, "init_std": 0.3},
}
"""What an embedding cannot be built without, or would prune all of."""
