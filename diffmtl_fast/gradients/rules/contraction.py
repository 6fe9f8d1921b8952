"""The rule of einsum of a batch and a parameter."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

from ..batch import Clusters
from .autocast import lower_precision
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule


def contract(input: Tensor, weight: Tensor, equation: str) -> Tensor:
    """Return ``torch.einsum(equation, input, weight)``."""
    return torch.einsum(equation, input, weight)


def as_contraction(equation: Any, *operands: Any) -> tuple[Tensor, Tensor, str] | None:
    """Return the arguments of `contract` for a call of einsum with a tensor and a parameter; None for others."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    if type(operands[1]) is Tensor:
        terms, out = equation.split("->")
        first, second = terms.split(",")
        equation, operands = f"{second},{first}->{out}", operands[::-1]
    return None if type(operands[0]) is not Tensor or type(operands[1]) is Tensor else (*operands, equation)


@register_cluster_rule(contract)
class Contract(ClusterRule):
    """y = einsum(equation, x, w): x [B, ...], y [B, ...]; every letter is in two of the three terms."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, input: Tensor, weight: Tensor, equation: str) -> Tensor:
        """See `ClusterRule`."""
        terms, out = equation.replace(" ", "").split("->")
        of_input, of_weight = terms.split(",")
        if of_input.startswith("...") and out.startswith("..."):
            free = [letter for letter in string.ascii_letters if letter not in equation]
            missing = "".join(free[: input.dim() - len(of_input) + 3])
            of_input, out = missing + of_input[3:], missing + out[3:]
        letters = [set(term) for term in (of_input, of_weight, out)]
        twice = all(sum(letter in each for each in letters) >= 2 for letter in set().union(*letters))
        once = all(len(a) == len(b) for a, b in zip(letters, (of_input, of_weight, out), strict=True))
        rows = of_input[:1] == out[:1] and of_input[:1] not in of_weight
        if not (twice and once and rows) or "." in of_input + of_weight + out:
            raise NoClusterRule(
                f"no rule for einsum {equation!r}: expected the batch first, and no sum over one term"
            )
        ctx.save_for_backward(input, weight)
        ctx.terms = of_input, of_weight, out
        return torch.einsum(f"{of_input},{of_weight}->{out}", input, weight)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        of_input, of_weight, out = ctx.terms
        by_input, by_weight = None, None
        if ctx.needs_input_grad[0]:
            by_input = torch.einsum(f"{out},{of_weight}->{of_input}", grad, weight)
        if ctx.needs_input_grad[1]:
            by_weight = weight.new_zeros(clusters.num, *weight.shape)
            for k, begin, end in clusters.spans(len(input)):
                rows = grad[begin:end], input[begin:end]
                by_weight[k] = torch.einsum(f"{out},{of_input}->{of_weight}", *rows)
        return by_input, by_weight, None
