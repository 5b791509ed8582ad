"""Integers for factors, each rounding made up for by what is rounded after it (Frantar et al. 2023, arXiv 2210.17323).

The components of a structured matrix cancel each other in part, so that an error of one factor alone may be many times
as large in the matrix. GPTQ's rounding of one column after another, under the quadratic form that says what an error of
the factor does to the output, keeps such errors in directions that do not matter. Here ``right`` is rounded first,
``left`` is solved for again with it, and is rounded then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat.fit import blast_systems as systems
from structmat.fit.linalg import damped_inverse, factorize
from structmat.formats import Blast, Dense, Factors, Quantized
from structmat.formats.quantized import round_group

DAMPING = 1e-6
"""The damping of the quadratic forms, relative to their mean diagonal."""

TINY = 1e-12
"""The share of the largest energy up to which a column counts as 0."""

TOGETHER = 32
"""The number of columns after whose rounding the columns behind them are changed, all at once."""


def round_factors(format: Quantized, factors: Factors, second_moment: Tensor | None = None) -> dict[str, Tensor]:
    """Round the factors of a structured matrix to integers so that the matrix, or its output, changes least.

    Args:
        format: The quantised format. Roundings are made up for in BLAST and low-rank matrices, and in dense ones where
            there is a second moment; those of others are rounded number by number.
        factors: The factors of its base.
        second_moment: The second moment ``E[x x^T] (N, N)`` of the inputs, with a ridge; None for the Frobenius norm.

    Returns:
        The factors of ``format``; those of plain rounding where these are better.
    """
    plain = format.rounded(factors)
    base = format.base
    metric = None if second_moment is None else second_moment.double()
    values = {name: factor.double() for name, factor in factors.items()}
    matrix = base.to_dense(values)
    if not format.rounded_factors or not bool(matrix.any()) or (metric is not None and not bool(metric.any())):
        return plain
    name = format.input_factor
    if name is None or (name == "weight" and metric is None):
        return plain
    dtype = factors[name].dtype
    columns = format.columns_of(matrix, None if metric is None else metric.diagonal()).to(dtype)
    values[name] = format.over_inputs(values[name], columns.double().reciprocal())
    scaled = None if metric is None else columns.double()[:, None] * metric * columns.double()
    found = _rounded(format, values, scaled, dtype) | {f"{name}_columns": columns}
    differences = ((matrix - _opened(format, one)) / columns.double() for one in (plain, found))
    errors = [_error(one, scaled) for one in differences]
    return found if errors[1] < errors[0] else plain


def _rounded(
    format: Quantized, values: dict[str, Tensor], metric: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Scales and integers of the factors, and couplings, for inputs that are scaled already."""
    base = format.base
    if isinstance(base, Dense) and metric is not None:
        return format.stored("weight", *_along(format, values["weight"][None], metric[None], base.shape, dtype))
    rounding = _Bases(format, base.to_dense(values), metric, dtype)
    if isinstance(base, Blast):
        left, diag, right = base.views(values)
        sizes = _sizes(left, diag, right, metric)
        specs = format.factor_specs()
        couplings = (diag / sizes).flatten(0, 1).to(specs["diag"].dtype or dtype)
        return {**rounding(left * sizes, couplings.view_as(diag).double(), right), "diag": couplings}
    left, right = (values[name][None] for name in ("left", "right"))
    ones = left.new_ones(1, 1, left.shape[-1])
    sizes = _sizes(left, ones, right, metric)
    return rounding(left * sizes, ones, right / sizes.mT)


def _sizes(left: Tensor, diag: Tensor, right: Tensor, metric: Tensor | None) -> Tensor:
    """Numbers ``(I, 1, R)`` to multiply the columns of ``left (I, P, R)`` by, before its rows get one scale each.

    The step of a row is in proportion to its norm, ``sum_r l_r^2 a_r^2``, and what it does to the output to
    ``sum_r h_r / a_r^2``, where ``1 / h`` is the diagonal of the inverse of the quadratic form, in which the other
    columns make up for an error. The product is least for ``a^4 = h / l^2``.

    Returns:
        The numbers ``a``; 1 where a column is 0.
    """
    energies = left.square().mean(1)
    forms = torch.stack([_form(couplings, right, metric)[1] for couplings in diag])
    sensitivity = damped_inverse(forms, DAMPING).diagonal(dim1=-2, dim2=-1).reciprocal()
    alive = (energies > TINY * energies.max()) & (sensitivity > TINY * sensitivity.max())
    sizes = torch.where(alive, sensitivity / energies, 1).pow(0.25)
    typical = (sizes.log() * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(alive, sizes / typical.exp(), 1)[:, None]


def _form(diag: Tensor, right: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """``X C (R, N)`` and ``X C X^T (R, R)`` of ``X = [D_1 right_1 … D_J right_J]``, from one row of blocks."""
    coupled = (diag[..., None] * right).transpose(0, 1).flatten(1)
    pulled = coupled if metric is None else coupled @ metric
    return pulled, pulled @ coupled.mT


def _opened(format: Quantized, factors: Factors) -> Tensor:
    """The matrix of rounded factors, in float64."""
    return format.base.to_dense({name: factor.double() for name, factor in format.opened(factors).items()})


@dataclass(frozen=True)
class _Bases:
    """The rounding of ``right``, and of ``left`` once it is solved for again.

    Attributes:
        format: The quantised format.
        weight: The matrix ``(M, N)`` to come near to.
        metric: The second moment of the inputs; None for the identity.
        dtype: The dtype of the scales.
    """

    format: Quantized
    weight: Tensor
    metric: Tensor | None
    dtype: torch.dtype

    def __call__(self, left: Tensor, diag: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Scales and integers of both, from ``(I, P, R)``, ``(I, J, R)`` as it is stored, and ``(J, R, Q)``."""
        format, shapes = self.format, self.format.rounded_factors
        forms = systems.right_gram(diag[None], systems.gram_of_columns(left[None]))[0]
        found = format.stored("right", *_across(format, right.mT, forms, shapes["right"], self.dtype))
        opened = format.open_factor("right", found).double().view_as(right)
        solved, grams = [], []
        for target, couplings in zip(self.weight.view(*left.shape[:2], -1), diag, strict=True):
            pulled, gram = _form(couplings, opened, self.metric)
            factor = factorize(gram.clone(), DAMPING * gram.diagonal().mean())
            solved.append(torch.cholesky_solve(pulled @ target.mT, factor).mT)
            grams.append(gram)
        rounded = _along(format, torch.stack(solved), torch.stack(grams), shapes["left"], self.dtype)
        return found | format.stored("left", *rounded)


def _along(
    format: Quantized, values: Tensor, forms: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Round rows ``values (B, n, K)`` whose groups lie along ``K``, under ``forms (B, K, K)``."""
    count, length = format.groups(shape)
    values = values.clone()
    scales = values.new_ones(*values.shape[:2], count).to(dtype)
    integers = torch.zeros(*values.shape[:2], count * length, dtype=torch.int8, device=values.device)

    def rounding(k: int, column: Tensor) -> Tensor:
        group = k // length
        if k % length == 0:
            scales[..., group] = round_group(values[..., k : k + length].float(), format.bits, dtype)[0]
        scale = scales[..., group].double().clamp_min(torch.finfo(torch.float32).tiny)
        most = 2 ** (format.bits - 1) - 1
        rounded = (column / scale).round().clamp(-most, most)
        integers[..., k] = rounded.to(torch.int8)
        return rounded * scale

    compensate_(values, forms, rounding, TOGETHER if count == 1 else length)
    return scales, integers


def _across(
    format: Quantized, values: Tensor, forms: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Round columns of ``values (B, n, K)`` whose groups lie along ``n``, under ``forms (B, K, K)``."""
    count, length = format.groups(shape)
    values = values.clone()
    B, n, K = values.shape
    scales = values.new_ones(B, K, count).to(dtype)
    integers = torch.zeros(B, K, count * length, dtype=torch.int8, device=values.device)

    def rounding(k: int, column: Tensor) -> Tensor:
        grouped = nn.functional.pad(column, (0, count * length - n)).unflatten(-1, (count, length))
        scale, rounded = round_group(grouped.float(), format.bits, dtype)
        scales[:, k], integers[:, k] = scale, rounded.flatten(1)
        return (rounded * scale.double().unsqueeze(-1)).flatten(1)[:, :n]

    compensate_(values, forms, rounding, TOGETHER)
    return scales, integers


def compensate_(
    values: Tensor, forms: Tensor, rounding: Callable[[int, Tensor], Tensor], together: int = TOGETHER
) -> None:
    """Round the columns of matrices one after the other, and change those that follow so that the loss rises least.

    The loss of an error ``E (n, K)`` of one matrix is ``tr(E H E^T)``.

    Args:
        values: ``(B, n, K)`` in float64, changed in place into what was rounded.
        forms: ``H (B, K, K)``.
        rounding: A function of a column's number and of what it has become, ``(B, n)``, that returns it rounded.
        together: The number of columns after which all others are changed.
    """
    upper = torch.linalg.cholesky(damped_inverse(forms.clone(), DAMPING), upper=True)
    K = values.shape[-1]
    for start in range(0, K, together):
        stop = min(start + together, K)
        errors = values.new_zeros(*values.shape[:2], stop - start)
        for k in range(start, stop):
            column = values[..., k].clone()
            rounded = rounding(k, column)
            error = (column - rounded) / upper[:, k, k, None]
            values[..., k + 1 : stop] -= error[..., None] * upper[:, None, k, k + 1 : stop]
            values[..., k] = rounded
            errors[..., k - start] = error
        values[..., stop:] -= errors @ upper[:, start:stop, stop:]


def _error(difference: Tensor, metric: Tensor | None) -> float:
    return float((difference * (difference if metric is None else difference @ metric)).sum())
