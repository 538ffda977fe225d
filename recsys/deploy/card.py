"""What a bundle tells of itself: the model card, and the list of software that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recsys.deploy.spec import EncoderSpec
from recsys.nn.model import Model


def card(recipe: Mapping[str, Any], told: Mapping[str, Any], model: Model, spec: EncoderSpec) -> dict[str, Any]:
    """Return the model card as plain values.

    Args:
        recipe: as resolved.
        told: versions, hashes and metrics, as in the manifest.
        model: that is in the bundle.
        spec: of its encoder.
    """
    return {
        "model": recipe.get("model", {}),
        "loss": recipe.get("loss"),
        "train": recipe.get("train", {}),
        "tasks": list(spec.tasks),
        "inputs": {
            "ids": [c.column for c in spec.ids],
            "numbers": [c.column for c in spec.numbers],
            "lists": {group.name: [c.column for c in group.columns] for group in spec.lists},
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": model.bytes(),
        "metrics": told["metrics"],
        "versions": told["versions"],
        "plugins": told["plugins"],
        "recipe": told["recipe"],
        "data": told["data"],
    }


def card_text(card: Mapping[str, Any]) -> str:
    """Return the model card for people to read."""
    inputs = card["inputs"]
    lines = [
        "# Model card",
        "",
        f"Predicts the probability of {', '.join(f'`{task}`' for task in card['tasks'])}.",
        "",
        f"- parameters: {card['parameters']:,} ({card['bytes']:,} bytes)",
        f"- ids: {_names(inputs['ids'])}",
        f"- numbers: {_names(inputs['numbers'])}",
        f"- lists: {_names([name for names in inputs['lists'].values() for name in names])}",
        f"- recipe (sha256): {card['recipe']}",
        f"- data (fingerprint): {card['data'] or 'unknown'}",
        f"- made with: {', '.join(f'{name} {version}' for name, version in card['versions'].items())}",
        "",
        "| split | metric | value |",
        "|---|---|---|",
    ]
    for split, metrics in card["metrics"].items():
        for metric, value in metrics.items():
            lines.append(f"| {split} | {metric} | {'undefined' if value is None else f'{value:.6f}'} |")
    return "\n".join(
        [*lines, "", "Intended use, limits and groups that were looked at: to be written by its owner.", ""]
    )


def components(told: Mapping[str, Any], graph: str) -> dict[str, Any]:
    """Return the software that made the bundle, as CycloneDX.

    Args:
        told: versions, as in the manifest.
        graph: sha256 of the graph.
    """
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": "model.onnx",
                "hashes": [{"alg": "SHA-256", "content": graph}],
            }
        },
        "components": [
            {
                "type": "library" if name != "python" else "platform",
                "bom-ref": f"{name}@{version}",
                "name": name,
                "version": version,
                "purl": f"pkg:{'pypi' if name != 'python' else 'generic'}/{name}@{version.replace('+', '%2B')}",
            }
            for name, version in told["versions"].items()
        ],
    }


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "none"
