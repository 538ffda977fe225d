"""What holds for every installed embedding: bytes on disk, what a file brings back, which rows teach it what."""

import pytest
import torch
from composition import EMBEDDINGS, OPTIONS, REGISTRY
from safetensors.torch import load_file, save_file

from recsys.abilities import Counting, Deciding
from recsys.contracts import EncodedSchema, Field, Selection
from recsys.nn.weightless import load_weights, weightless

ROWS = {"a": 2500, "b": 1200, "c": 12}
SCHEMA = EncodedSchema(tuple(Field(name, rows) for name, rows in ROWS.items()))
DIM = 16


def build(name, seed=0, schema=SCHEMA):
    torch.manual_seed(seed)
    spec = {"use": name, "dim": DIM} | OPTIONS.get(name, {})
    made = REGISTRY.build("embedding", spec, schema, where="model.embedding")
    if isinstance(made, Counting):
        made.take_counts({f.name: (torch.arange(f.rows) * 7919) % 97 for f in schema.fields})
    return made.eval()


def every_id(f):
    """All ids of one field, beside some of the others, `[rows, F]`."""
    rows = list(ROWS.values())
    ids = torch.stack([torch.arange(rows[f]) % size for size in rows], 1)
    ids[:, f] = torch.arange(rows[f])
    return ids


def chosen(made):
    """What the embedding leaves out by itself, else half of the first field's rows."""
    if isinstance(made, Deciding):
        return made.kept()
    return Selection(tuple(ROWS), {"a": torch.arange(ROWS["a"]) % 2 == 0})


def kept(selection, name, f, ids):
    """`[rows, D]`: whether the selection keeps the numbers of field f's ids."""
    mask = torch.full((len(ids), DIM), name in selection.fields)
    if name in selection.rows:
        mask &= selection.rows[name][ids[:, f]].unsqueeze(1)
    if name in selection.dims:
        mask &= selection.dims[name]
    return mask & selection.elements[name][ids[:, f]] if name in selection.elements else mask


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_every_id_of_the_pruned_embedding_gives_its_vector_or_zeros(name):
    made = build(name)
    selection = chosen(made)
    small = made.prune(selection)
    with torch.no_grad():
        for f, field in enumerate(ROWS):
            ids = every_id(f)
            mask = kept(selection, field, f, ids)
            got, want = small(ids, None)[:, f], made(ids, None)[:, f]
            torch.testing.assert_close(got, want * mask, rtol=1e-6, atol=1e-7)
            assert not bool(got[~mask].any()), "what is gone is zero"


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_files_shrink_with_the_bytes_that_are_told(name, tmp_path):
    made = build(name)
    small = made.prune(chosen(made))
    sizes = []
    for i, module in enumerate((made, small)):
        tables = {key: t.contiguous() for key, t in module.export_tables().items()}
        save_file(tables, tmp_path / str(i))
        told, written = sum(t.nbytes for t in tables.values()), (tmp_path / str(i)).stat().st_size
        assert told <= written <= 1.01 * told + 4096
        sizes.append(written)
    # Where ids share rows, leaving some out frees none of them and costs a bit each.
    assert sizes[1] < sizes[0] + sum(ROWS.values())
    if isinstance(made, Deciding) and getattr(made, "budget", None):
        assert sum(t.nbytes for t in small.export_tables().values()) <= made.budget * 4 * sum(ROWS.values()) * DIM


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_file_brings_back_every_vector_to_the_last_bit(name, tmp_path):
    made = build(name)
    selection = chosen(made)
    small = made.prune(selection)
    for i, (module, fresh) in enumerate(((made, build(name, 1)), (small, build(name, 1).prune(selection)))):
        save_file({key: t.contiguous() for key, t in module.state_dict().items()}, tmp_path / str(i))
        fresh.load_state_dict(load_file(tmp_path / str(i)))
        with torch.no_grad():
            for f in range(len(ROWS)):
                ids = every_id(f)
                assert torch.equal(fresh.eval()(ids, None), module.eval()(ids, None))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_without_weights_it_is_pruned_and_takes_those_of_the_state(name):
    made = build(name)
    selection = chosen(made)
    small = made.prune(selection)
    with weightless():
        fresh, fresh_small = build(name, 1), build(name, 1).prune(selection)
    assert all(p.is_meta for module in (fresh, fresh_small) for p in module.parameters())
    for module, empty in ((made, fresh), (small, fresh_small)):
        load_weights(empty, module.state_dict())
        with torch.no_grad():
            for f in range(len(ROWS)):
                assert torch.equal(empty.eval()(every_id(f), None), module.eval()(every_id(f), None))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_field_of_one_value_and_one_that_is_left_out_whole(name):
    schema = EncodedSchema((Field("a", 300), Field("only", 3)))
    torch.manual_seed(0)
    spec = {"use": name, "dim": 8} | OPTIONS.get(name, {})
    made = REGISTRY.build("embedding", spec, schema, where="model.embedding")
    if isinstance(made, Counting):
        made.take_counts({"a": torch.arange(300), "only": torch.tensor([0, 0, 300])})
    made.eval()
    ids = torch.stack([torch.arange(300), torch.full((300,), 2)], 1)
    with torch.no_grad():
        want = made(ids, None)
        assert bool(want.isfinite().all())
        small = made.prune(Selection(("only",), {"a": torch.zeros(300, dtype=torch.bool)}))
        got = small(ids, None)
    assert not bool(got[:, 0].any())
    torch.testing.assert_close(got[:, 1], want[:, 1], rtol=1e-6, atol=1e-7)
