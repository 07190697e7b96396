"""Curvature of the loss, per component: traces, both spectral ends, couplings, with their errors.

One estimator a file. All of them work on a `Hessian`, an operator made from a loss with a live
graph, and return `diagnoser.types.Estimate`.
"""

from diagnoser.curvature.along import (
    Coupling,
    RowCurvature,
    block_curvature,
    coupling_matrix,
    row_curvature,
)
from diagnoser.curvature.block_trace import Aim, block_trace
from diagnoser.curvature.coupling import coupling_norm, coupling_norms
from diagnoser.curvature.fused_attention import second_derivative_of_fused_attention
from diagnoser.curvature.hessian import Block, Hessian, Vector
from diagnoser.curvature.lanczos import (
    Ends,
    block_eigenvalues,
    extreme_eigenvalues,
    largest_eigenvalues,
    precondition,
)
from diagnoser.curvature.per_sample import (
    Direction,
    RandomSigns,
    SampleForms,
    batch_error,
    forms_along,
    forms_of,
)
from diagnoser.curvature.self_checks import (
    finite_difference_defect,
    symmetry_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.curvature.trace import hutchinson_trace

__all__ = [
    "Aim",
    "Block",
    "Coupling",
    "Direction",
    "Ends",
    "Hessian",
    "RandomSigns",
    "RowCurvature",
    "SampleForms",
    "Vector",
    "batch_error",
    "block_curvature",
    "block_eigenvalues",
    "block_trace",
    "coupling_matrix",
    "coupling_norm",
    "coupling_norms",
    "extreme_eigenvalues",
    "finite_difference_defect",
    "forms_along",
    "forms_of",
    "hutchinson_trace",
    "largest_eigenvalues",
    "precondition",
    "row_curvature",
    "second_derivative_of_fused_attention",
    "symmetry_defect",
    "unreliable_nodes",
    "unverified_nodes",
]
