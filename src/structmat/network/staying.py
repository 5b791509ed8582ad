"""What stays dense in a network, and why."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.parameter import is_lazy

from structmat._names import alike
from structmat.network.fused import opened
from structmat.network.sites import DENSE_KINDS, Site, find_sites
from structmat.nn import StructuredModule

LOOKED_UP = "an embedding is looked up, not multiplied by"
NO_MATRIX = "their parameters are no matrices"


def what_stays(model: nn.Module, known: Collection[str], otherwise: str) -> dict[str, str]:
    """Say of everything in a network that holds parameters and is not structured why it stays dense.

    Args:
        model: The network.
        known: The names of sites that are accounted for elsewhere.
        otherwise: What is said of sites that nothing keeps from being structured.

    Returns:
        The reason by name. Names that differ in numbers alone are together, and so are embeddings, norms and other
        modules without a matrix, for each of their types.
    """
    sites = find_sites(model)
    accounted = set(known)
    single: dict[str, str] = {
        name: site.problem or otherwise for name, site in sites.items() if accounted.isdisjoint(site.names)
    }
    single |= unseen_weights(model, sites)
    found = {joint: single[members[0]] for joint, members in alike(single.items()).items()}
    return found | plain_modules(model)


def plain_modules(model: nn.Module) -> dict[str, str]:
    """Say of the embeddings, norms and other modules without a matrix why they stay dense, each type together.

    Args:
        model: The network.

    Returns:
        The reason by type and number, such as ``"LayerNorm (12 modules, 9,216 parameters)"``.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    within = opened(model).closed
    for module in model.modules():
        own = [one for one in module._parameters.values() if one is not None and not is_lazy(one)]
        if not own or isinstance(module, StructuredModule) or id(module) in within:
            continue
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            reason = LOOKED_UP
        elif all(sum(size > 1 for size in one.shape) <= 1 for one in own):
            reason = NO_MATRIX
        else:
            continue
        counts.setdefault((type(module).__name__, reason), []).append(sum(one.numel() for one in own))
    return {
        f"{kind} ({len(sizes)} module{'s' if len(sizes) > 1 else ''}, {sum(sizes):,} parameters)": reason
        for (kind, reason), sizes in counts.items()
    }


def unseen_weights(model: nn.Module, sites: dict[str, Site] | None = None) -> dict[str, str]:
    """Every matrix of the network that is in no linear layer or convolution, and why it is not replaced.

    Such are experts that a model fuses into one parameter of three dimensions, learned position tables, and modules
    that hold several matrices but cannot be split.

    Args:
        model: The network.
        sites: Its sites, where they are known; None to find them.

    Returns:
        What holds each parameter that has at least two dimensions larger than 1 and belongs to no site, no embedding
        and no structured layer, by the parameter's name.
    """
    found = opened(model)
    sites = find_sites(model) if sites is None else sites
    seen = {name for site in sites.values() if isinstance(site.module, tuple(DENSE_KINDS)) for name in site.names}
    unseen: dict[str, str] = {}
    done: set[int] = set()
    for name, module in found.modules:
        if name in seen or id(module) in done or id(module) in found.closed:
            continue
        done.add(id(module))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, StructuredModule)):
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and sum(size > 1 for size in parameter.shape) > 1:
                shape = " x ".join(map(str, parameter.shape))
                unseen[f"{name}.{own}" if name else own] = f"{shape}, held by a {type(module).__name__}, " + (
                    f"but {found.problems[id(module)]}"
                    if id(module) in found.problems
                    else "which is no linear layer or convolution to replace"
                )
    return unseen
