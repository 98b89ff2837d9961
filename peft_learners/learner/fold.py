"""Folding: a primed layer's whole update becomes the nearest product of a rank, and its dense delta goes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.low_rank import Factored, nearest
from ..phases.ddp import broadcast_choice, is_first_process
from ..phases.driver import Training
from ..phases.schedule import ScheduleError
from ..structure.targets import rank_patterns
from .config import LearnerConfig
from .layer import LearnerLinear

#: Share of the energy under which a layer is named in a warning.
LOW_SHARE = 0.9


def folding_layers(root: nn.Module, adapter: str) -> dict[str, LearnerLinear]:
    """The layers of an adapter that have a dense delta now, by name."""
    modules = root.named_modules()
    return {n: m for n, m in modules if isinstance(m, LearnerLinear) and m.dense_delta(adapter) is not None}


@torch.no_grad()
def fold(root: nn.Module, adapter: str, config: LearnerConfig, training: Training) -> None:
    """Put the nearest product of a rank in place of each primed layer's `scaling P2 P1 + priming_lr_scale theta`.

    The product is the truncated SVD of the update (Eckart and Young), its singular values shared evenly between the
    factors. What the optimizer holds of the factors is dropped, and theta with all that it holds of it. Layer by
    layer, on all ranks alike. The kept share of each update's energy (the sum of its squared singular values) goes
    into `config.kept_energy`, least and median of them into the line about the boundary.
    """
    layers = folding_layers(root, adapter)
    _refuse_not_finite(layers, adapter)
    ranks = fold_ranks(layers, adapter, config)
    kept: dict[str, float] = {}
    for name, layer in layers.items():
        update = layer.whole_update(adapter)
        if update.is_meta:  # shapes alone
            rank = min(ranks[name], *update.shape)
            pair = Factored(update.new_empty(rank, update.shape[1]), update.new_empty(update.shape[0], rank))
        elif not bool(update.any()):  # the model does not use the layer
            pair = None
        else:
            pair = _same_on_all_ranks(nearest(update, ranks[name]), training)
            if not isinstance(config.fold_rank, float):
                pair = _filled(pair, min(ranks[name], *update.shape), layer.value("learner_P1", adapter))
        kept[name] = 1 - pair.error**2 if pair is not None else 1.0
        if pair is not None:
            layer.take_factors(adapter, pair, training.optimizer)
        layer.drop_dense(adapter, training.optimizer)
    record_ranks(root, adapter, config)
    config.write("kept_energy", kept)
    if is_first_process():
        _warn_of_low(adapter, config, kept)


def _warn_of_low(adapter: str, config: LearnerConfig, kept: Mapping[str, float]) -> None:
    asked = config.fold_rank if isinstance(config.fold_rank, float) else 1.0
    low = sorted((share, name) for name, share in kept.items() if share < min(LOW_SHARE, asked))
    rank = config.fold_rank if isinstance(config.fold_rank, int) else config.r
    if low:
        named = ", ".join(f"{name} {share:.0%}" for share, name in low[:5])
        warnings.warn(
            f"Folding the adapter {adapter!r} kept less than {LOW_SHARE:.0%} of the energy of {len(low)} updates "
            f"({named}{', ...' if len(low) > 5 else ''}). A higher rank keeps more: "
            f"LearnerConfig(r={config.r}, fold_rank={2 * rank}).",
            stacklevel=2,
        )


def _refuse_not_finite(layers: Mapping[str, LearnerLinear], adapter: str) -> None:
    """No SVD has an answer then, and nothing is folded."""
    updates = ((name, layer.whole_update(adapter)) for name, layer in layers.items())
    broken = [name for name, update in updates if not (update.is_meta or bool(torch.isfinite(update).all()))]
    if broken:
        scale = layers[broken[0]].learner_lr_scale[adapter]
        raise ScheduleError(
            f"The adapter {adapter!r} can't be folded: {len(broken)} of its updates (first: {broken[0]}) hold NaN or "
            "infinity. Priming has diverged: take a lower learning rate, or "
            f"LearnerConfig(priming_lr_scale={scale / 10:.1g})."
        )


def _filled(pair: Factored, rank: int, p1: Tensor) -> Factored:
    """The same product at a rank that its update has not: with rows of the old P1, which go on training."""
    rows = p1.detach()[: rank - pair.rank].to(pair.a)
    if pair.rank >= rank or not len(rows):
        return pair
    b = torch.cat([pair.b, pair.b.new_zeros(len(pair.b), len(rows))], dim=1)
    return Factored(torch.cat([pair.a, rows]), b, pair.error)


def fold_ranks(layers: Mapping[str, LearnerLinear], adapter: str, config: LearnerConfig) -> Mapping[str, int]:
    """The rank that each layer is folded into.

    A share of the energy asks of each layer the least rank that keeps it. Where that would take more parameters than
    rank r (or the layers' own ranks, where they are higher), all keep the largest share that fits instead.
    """
    if not isinstance(config.fold_rank, float):
        return {name: config.fold_rank or layer.learner_r[adapter] for name, layer in layers.items()}
    sizes = {name: int(layer.in_features + layer.out_features) for name, layer in layers.items()}
    bound = sum(max(layer.learner_r[adapter], config.r) * sizes[name] for name, layer in layers.items())
    lost = {name: _lost_by_rank(layer.whole_update(adapter)) for name, layer in layers.items()}

    def ranks(share: float) -> dict[str, int]:
        """Smallest ranks of at least 1 that lose no more than `1 - share`."""
        return {name: max(1, int((own > 1 - share).sum())) for name, own in lost.items()}

    def cost(share: float) -> int:
        return sum(rank * sizes[name] for name, rank in ranks(share).items())

    if cost(config.fold_rank) <= bound:
        return ranks(config.fold_rank)
    low, high = 0.0, config.fold_rank
    for _ in range(50):  # far below the distance of two shares in float64
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= bound else (low, middle)
    return ranks(low)


def _lost_by_rank(update: Tensor) -> Tensor:
    """`lost[k]`: share of the energy that the first k singular values leave, float64 on the CPU."""
    energy = torch.linalg.svdvals(update).cpu().double().square()
    if not float(energy.sum()):
        return torch.zeros(1, dtype=torch.float64)
    rest = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([rest, rest.new_zeros(1)]) / rest[0]


def _same_on_all_ranks(pair: Factored, training: Training) -> Factored:
    """The first rank's pair: all have the same update, but a library may round an SVD by where it runs."""
    if training.ranks is None:
        return pair
    rank = int(broadcast_choice({"rank": torch.tensor([pair.rank])}, training.ranks)["rank"])
    a, b = pair.a[:rank], pair.b[:, :rank]
    if pair.rank < rank:
        a, b = pair.a.new_zeros(rank, pair.a.shape[1]), pair.b.new_zeros(len(pair.b), rank)
    flat = broadcast_choice({"a": a.flatten(), "b": b.flatten()}, training.ranks)
    error = broadcast_choice({"error": torch.tensor([pair.error], dtype=torch.float32)}, training.ranks)["error"]
    return Factored(flat["a"].view_as(a), flat["b"].view(b.shape), float(error))


def record_ranks(root: nn.Module, adapter: str, config: LearnerConfig) -> None:
    """Write the ranks of an adapter's layers into its config, from which a file's layers are made."""
    layers = {n: m for n, m in root.named_modules() if isinstance(m, LearnerLinear) and m.has_adapter(adapter)}
    config.write("rank_pattern", rank_patterns({n: m.learner_r[adapter] for n, m in layers.items()}, config.r))
