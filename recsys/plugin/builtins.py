"""The components of the core, registered through the same hook as anybody's."""

from __future__ import annotations

from recsys.data.samplers import InBatch, Popularity, Uniform
from recsys.data.simulate import Simulated
from recsys.data.sources import Files
from recsys.deploy.calibrate import Calibrate
from recsys.deploy.export import Export
from recsys.nn.fixed import Fixed
from recsys.nn.interaction import FM, MLP, CrossNet
from recsys.nn.selection import KeepAll
from recsys.nn.sequence import MeanPool
from recsys.nn.table import Table
from recsys.plugin.hooks import Component, hookimpl
from recsys.train.losses import BCE
from recsys.train.metrics import AUC, ECE, GAUC, PRAUC, LogLoss, NormalizedEntropy
from recsys.train.ranking_metrics import MAP, MRR, NDCG, Hit, Precision, Recall
from recsys.train.stages import CountRows, Evaluate, Fit, Positions, Prune, Quantize, RankFields, Reset, Rewind


@hookimpl
def recsys_components() -> list[Component]:
    """Return what every installation has."""
    return [
        Component("source", "files", Files),
        Component("source", "simulated", Simulated),
        Component("embedding", "table", Table),
        Component("selector", "keep_all", KeepAll),
        Component("selector", "fixed", Fixed),
        Component("sequence", "mean_pool", MeanPool),
        Component("interaction", "fm", FM),
        Component("interaction", "mlp", MLP),
        Component("interaction", "cross", CrossNet),
        Component("loss", "bce", BCE),
        Component("sampler", "uniform", Uniform),
        Component("sampler", "popularity", Popularity),
        Component("sampler", "in_batch", InBatch),
        Component("metric", "auc", AUC),
        Component("metric", "logloss", LogLoss),
        Component("metric", "gauc", GAUC),
        Component("metric", "ece", ECE),
        Component("metric", "normalized_entropy", NormalizedEntropy),
        Component("metric", "pr_auc", PRAUC),
        Component("metric", "ndcg", NDCG),
        Component("metric", "recall", Recall),
        Component("metric", "precision", Precision),
        Component("metric", "hit", Hit),
        Component("metric", "mrr", MRR),
        Component("metric", "map", MAP),
        Component("stage", "count_rows", CountRows),
        Component("stage", "fit", Fit),
        Component("stage", "rewind", Rewind),
        Component("stage", "reset", Reset),
        Component("stage", "rank_fields", RankFields),
        Component("stage", "prune", Prune),
        Component("stage", "quantize", Quantize),
        Component("stage", "positions", Positions),
        Component("stage", "evaluate", Evaluate),
        Component("stage", "calibrate", Calibrate),
        Component("stage", "export", Export),
    ]
