"""Every installed selector over embeddings and under interactions that differ most: pruned is masked."""

import pytest
import torch
from composition import OPTIONS, REGISTRY
from test_composition import train

from recsys.api import RankedFields
from recsys.contracts import EncodedSchema, Field, History, Selection
from recsys.nn.head import Head
from recsys.nn.model import Model
from recsys.nn.selection import both, save_selection
from recsys.testing import samples
from recsys.train.losses import BCE

FIELDS = (Field("a", 90), Field("b", 60), Field("x", 2, numeric=True), Field("c", 30))
SCHEMA = EncodedSchema(FIELDS, (History("h", (Field("i", 90, shares="a"),), 5, ("a",)),))
DIM = 8
SELECTORS = [name for name in REGISTRY.names("selector") if name != "keep_all"]
EMBEDDINGS = {
    "table": {"use": "table", "init_std": 0.5},
    "optembed": {"use": "optembed"},
    "unified": {"use": "unified", **OPTIONS["unified"]},
}
CONSUMERS = {
    "autoint": [{"use": "autoint", "layers": 2, "width": 8}],
    "din": [{"use": "mlp", "hidden": [16]}],
    "armnet": [{"use": "armnet", "heads": 2, "neurons": 4}],
    "dcnv2": [{"use": "cross", "layers": 2}, {"use": "mlp", "hidden": [16]}],
    "fm": ["fm"],
}
"""All of them read a history; `din` by its own unit, the others by the mean of the events."""


def build(embedding, selector, consumer, folder):
    torch.manual_seed(0)
    table = REGISTRY.build("embedding", EMBEDDINGS[embedding] | {"dim": DIM}, SCHEMA, where="model.embedding")
    spec = {"use": selector}
    if selector == "fixed":
        chosen = Selection(("a", "c", "x"), {"a": torch.arange(90) % 3 > 0}, {"c": torch.arange(DIM) < 5})
        save_selection(chosen, folder / "selection.safetensors")
        spec["from"] = str(folder / "selection.safetensors")
    part = REGISTRY.build("selector", spec, table.fields, where="model.selector")
    seen = Model.consumer_fields(SCHEMA, table)
    parts = [REGISTRY.build("interaction", i, seen, where="model.interaction") for i in CONSUMERS[consumer]]
    reads = REGISTRY.build("sequence", "din" if consumer == "din" else "mean_pool", DIM, where="model.sequence")
    return Model(SCHEMA, table, part, {"h": reads}, parts, Head(SCHEMA, parts))


def search(model):
    """A step of what waits for a bilevel search, and a ranking for what waits for one."""
    model.train()
    for part in model.searched():
        value = model.objective(BCE(SCHEMA.tasks), samples.batch(32, SCHEMA, seed=7))
        found = torch.autograd.grad(value, part.architecture(), allow_unused=True)
        for parameter, gradient in zip(part.architecture(), found, strict=True):
            parameter.grad = gradient
        part.search_step(0.05)
    if isinstance(model.selector, RankedFields):
        model.selector.importance.copy_(torch.tensor([0.3, 0.1, 0.2, 0.4]))
        model.selector.ranked.fill_(True)


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_it_trains_is_pruned_and_predicts_as_masked(selector, embedding, consumer, tmp_path):
    model = build(embedding, selector, consumer, tmp_path)
    train(model)
    search(model)
    model.selector.anneal(1.0)
    model.eval()
    selection = model.kept()
    small = model.prune(selection)
    batch = samples.batch(40, SCHEMA, seed=9)
    with torch.no_grad():
        # The selector gates what fields give; a history is masked by what the embedding itself leaves out.
        gated = model.selector(model.embedding(batch.ids, batch.values), batch.ids)
        pruned = small.represent(batch.ids, batch.values, batch.history)
        torch.testing.assert_close(pruned[:, : len(FIELDS)], gated, rtol=1e-6, atol=0)
        dropped = [f for f, field in enumerate(FIELDS) if field.name not in selection.fields]
        assert not pruned[:, dropped].any()
        events = small.sequences[0](target_of(small, batch), events_of(small, batch), batch.history["h"][1])
        seen = torch.cat([gated, events.unsqueeze(1)], 1)
        wanted = model.head([part(seen) for part in model.interactions], batch.ids, batch.values)
        for task, logit in small(batch).items():
            torch.testing.assert_close(logit, wanted[task], rtol=1e-5, atol=1e-6)
    assert both(selection, model.selector.kept()).fields == selection.fields, "what the selector drops is dropped"
    assert small.bytes() <= model.bytes() + sum(f.rows for f in FIELDS)


def target_of(model, batch):
    """`[B, W]`."""
    return model.embedding(batch.ids, batch.values)[:, 0]


def events_of(model, batch):
    """`[B, L, W]`."""
    return model.embedding.history("h", batch.history["h"][0]).flatten(2)
