"""What a compression by many processes costs: multiplications, seconds, memory and bytes moved, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from structmat._ranks import SHARES
from structmat._ranks.group import deal
from structmat._ranks.sums import ARITY
from structmat.compress.efforts import EFFORTS
from structmat.compress.sequential import FORWARD_COST
from structmat.compress.spectra import spectrum_cost
from structmat.fit import Lee2024Blast, Method
from structmat.formats import Blast

KINDS = ("gradients", "calls", "moments", "solves", "spectra", "fits", "refinement")
"""The kinds of work: backward passes, calls, second moments, systems of equations, spectra, fits, and refinement."""

RIDGES_COST = 1.5
"""The multiplications for the choice of a ridge, in units of ``N^3``."""

EFFORT = EFFORTS["default"]
"""The effort whose work is counted."""


@dataclass(frozen=True)
class Stage:
    """Layers of a block that read the same input.

    Attributes:
        layers: The shapes ``(M, N)``.
        copies: How often the stage is in the block: the number of experts.
        active: Through how many of them a token goes.
    """

    layers: tuple[tuple[int, int], ...]
    copies: int = 1
    active: int = 1


@dataclass(frozen=True)
class Network:
    """A network of equal blocks.

    Attributes:
        blocks: The number of blocks.
        stages: The stages of a block.
        width: The width of the hidden states.
        outside: The number of parameters outside the blocks.
        heads: The number of parameters that a token is multiplied by outside the blocks.
    """

    blocks: int
    stages: tuple[Stage, ...]
    width: int
    outside: int = 0
    heads: int = 0

    @classmethod
    def llama(
        cls, width: int, inner: int, blocks: int, keys: int, vocabulary: int, *, experts: int = 1, active: int = 1
    ) -> Network:
        """A Llama, or a mixture of experts in the place of each MLP.

        Args:
            width: The width of the hidden states.
            inner: The width within an MLP.
            blocks: The number of blocks.
            keys: The width of the keys and of the values.
            vocabulary: The number of tokens that the network knows.
            experts: The number of experts.
            active: The number of experts that a token goes through.

        Returns:
            The network.
        """
        stages = (
            Stage(((width, width), (keys, width), (keys, width))),
            Stage(((width, width),)),
            Stage(((inner, width), (inner, width)), experts, active),
            Stage(((width, inner),), experts, active),
        )
        return cls(blocks, stages, width, 2 * vocabulary * width, vocabulary * width)

    @property
    def block_entries(self) -> int:
        """The number of entries of a block's weights."""
        return sum(stage.copies * M * N for stage in self.stages for M, N in stage.layers)

    @property
    def block_active(self) -> int:
        """The number of entries of a block's weights that a token is multiplied by."""
        return sum(stage.active * M * N for stage in self.stages for M, N in stage.layers)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return self.blocks * self.block_entries + self.outside


@dataclass(frozen=True)
class Job:
    """What is done with a network.

    Attributes:
        tokens: The number of tokens of calibration data.
        batches: The number of batches in which they come.
        keep: The share of the weights that is kept.
        counts: The number of blocks of a BLAST matrix in both directions.
        steps: The number of steps of the refinement of each block; 0 for none.
        step_batches: The number of batches that a step sees.
        allocates: Whether layers share the budget first.
        method: The method of the fits; None for the default one.
        curves: The method of the fits of an allocation; None for the default one.
        value_bytes: The bytes of a number in the weights and in the hidden states.
    """

    tokens: int = 512 * 512
    batches: int = 512
    keep: float = 0.5
    counts: int = 16
    steps: int = 0
    step_batches: int = 8
    allocates: bool = True
    method: Method[Blast] | None = None
    curves: Method[Blast] | None = None
    value_bytes: int = 2

    def fit_cost(self, shape: tuple[int, int], method: Method[Blast] | None = None) -> float:
        """The multiplications of a fit of one layer."""
        format = Blast.for_budget(*shape, keep=self.keep, blocks=self.counts)
        return (method or self.method or Lee2024Blast()).cost(format, aware=True)


@dataclass(frozen=True)
class Machine:
    """How fast a process is.

    Attributes:
        seconds: The seconds of a multiplication of each of ``KINDS``.
        bandwidth: The bytes that go from a process to another one in a second.
        latency: The seconds of an exchange of few bytes.
    """

    seconds: Mapping[str, float]
    bandwidth: float
    latency: float


H100 = Machine(
    {
        "gradients": 1 / 150e12,
        "calls": 1 / 150e12,
        "moments": 1 / 20e12,
        "solves": 1 / 15e12,
        "spectra": 1 / 2e12,
        "fits": 1 / 12e12,
        "refinement": 1 / 12e12,
    },
    bandwidth=40e9,
    latency=1e-4,
)
"""An NVIDIA H100 SXM, assumed and not measured: 30 to 60 % of what its data sheet promises in bfloat16 for calls, in
float32 for moments, fits and refinement, and in float64 for systems; 400 Gbit/s between machines."""


@dataclass(frozen=True)
class Expected:
    """What a compression costs.

    Attributes:
        work: The multiplications of all processes together, by kind.
        seconds: The seconds by kind, under ``"exchange"`` those of moving bytes.
        moved: The bytes that a process receives.
        memory: The bytes that a process holds on its device at most, and in the host's memory.
    """

    work: Mapping[str, float]
    seconds: Mapping[str, float]
    moved: float
    memory: tuple[float, float]

    @property
    def total(self) -> float:
        """The seconds of everything."""
        return sum(self.seconds.values())


def expected(network: Network, job: Job, machine: Machine, processes: int) -> Expected:
    """What a compression costs.

    Args:
        network: The network.
        job: What is done.
        machine: How fast a process is.
        processes: The number of processes.

    Returns:
        The cost; the model is checked in ``docs/scale.md``.
    """
    work = _work(network, job)
    parallel = dict.fromkeys(KINDS, float(processes)) | {"solves": 1.0}
    shared = _speedup(job.batches, min(processes, SHARES))
    parallel |= {"gradients": shared, "calls": shared, "moments": shared}
    parallel["refinement"] = _speedup(min(job.step_batches, job.batches), processes)
    parallel["fits"] = work["fits"] / max(_longest(network, job, processes), 1e-300)
    seconds = {kind: work[kind] / parallel[kind] * machine.seconds[kind] for kind in KINDS}
    moved, exchanges = _moved(network, job, processes)
    seconds["exchange"] = moved / machine.bandwidth + exchanges * machine.latency
    return Expected(work, seconds, moved, _memory(network, job, processes))


def _speedup(pieces: int, processes: int) -> float:
    """How much faster equal pieces are done by processes."""
    return pieces / math.ceil(pieces / processes)


def _work(network: Network, job: Job) -> dict[str, float]:
    """The multiplications by kind."""
    work = dict.fromkeys(KINDS, 0.0)
    for stage in network.stages:
        N = stage.layers[0][1]
        tokens = job.tokens * stage.active
        work["moments"] += tokens * 2 * N**2
        work["solves"] += stage.copies * RIDGES_COST * N**3
        for M, _ in stage.layers:
            work["calls"] += FORWARD_COST * tokens * M * N
            work["solves"] += stage.copies * (N**3 / 3 + 4 * M * N**2)
            work["fits"] += stage.copies * job.fit_cost((M, N))
            work["refinement"] += (
                3 * job.steps * job.tokens * job.step_batches / job.batches * job.keep * (stage.active * M * N)
            )
            if job.allocates:
                few, many = (min(job.tokens, most) for most in (EFFORT.gradients, EFFORT.moments))
                work["gradients"] += few * stage.active * (3 * M * N + M**2) + many * stage.active * M * N
                work["moments"] += many * stage.active * N**2 / len(stage.layers)
                work["spectra"] += stage.copies * spectrum_cost(M, N)
    work = {kind: network.blocks * value for kind, value in work.items()}
    if job.allocates:
        work["gradients"] += 3 * min(job.tokens, EFFORT.gradients) * network.heads
        work["fits"] += sum(_stand_ins(network, job))
    return work


def _stand_ins(network: Network, job: Job) -> list[float]:
    """The multiplications of the fits of an allocation, to one layer of each kind in a few sizes."""
    if not job.allocates:
        return []
    kinds = [shape for stage in network.stages for shape in stage.layers]
    format = Blast.for_budget(*kinds[0], keep=job.keep, blocks=job.counts)
    method = job.curves or EFFORT.curve_method(format)
    return [job.fit_cost(shape, method) for shape in kinds for _ in range(EFFORT.sizes)]


def _longest(network: Network, job: Job, processes: int) -> float:
    """The multiplications of the fits that come one after the other."""
    total = 0.0
    for stage in network.stages:
        costs = [job.fit_cost(shape) for shape in stage.layers]
        total += stage.copies * _makespan(costs, processes)
    return network.blocks * total + _makespan(_stand_ins(network, job), processes)


def _makespan(costs: list[float], processes: int) -> float:
    """The load of the process with the most work."""
    loads = [0.0] * processes
    for cost, owner in zip(costs, deal(costs, processes), strict=True):
        loads[owner] += cost
    return max(loads)


def _moved(network: Network, job: Job, processes: int) -> tuple[float, float]:
    """The bytes that a process receives, and the number of exchanges."""
    if processes == 1:
        return 0.0, 0.0
    rounds = math.ceil(math.log2(processes)) + 1  # sums come together in a tree, and the total goes to all
    moved = exchanges = 0.0
    for stage in network.stages:
        N = stage.layers[0][1]
        factors = sum(4 * job.keep * M * N for M, _ in stage.layers)
        moved += stage.copies * (rounds * 2 * 2 * 8 * N**2 + factors)
        moved += job.steps * rounds * stage.copies * factors  # the gradients of a step
        exchanges += stage.copies * (8 * processes + len(stage.layers))
        if job.allocates:
            moved += stage.copies * rounds * 8 * (N**2 + sum(M**2 for M, _ in stage.layers))
    exchanges += 2 * job.steps * rounds
    return network.blocks * moved, network.blocks * exchanges


def _memory(network: Network, job: Job, processes: int) -> tuple[float, float]:
    """The bytes on the device, and in the host's memory, with ``--stream``."""
    widest = max(stage.layers[0][1] for stage in network.stages)
    largest = max(M * N for stage in network.stages for M, N in stage.layers)
    block = 2 * job.value_bytes * network.block_entries
    held = 1 + math.ceil(math.log(math.ceil(SHARES / processes), ARITY) - 1e-9)  # sums of the tree at a time
    sums = held * 2 * 2 * 8 * widest**2  # to learn from and held out, of two moments
    fit = 4 * 8 * largest + 3 * 8 * widest**2
    states = 2 * job.value_bytes * job.tokens * network.width / min(processes, job.batches, SHARES)
    kept = job.value_bytes * job.tokens * sum(stage.layers[0][1] for stage in network.stages) / processes
    outside = job.value_bytes * network.outside
    return block + max(sums, fit) + outside, states + min(kept, 4 * 2**30)
